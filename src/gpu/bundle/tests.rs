use super::*;
use crate::gpu::GpuOptions;
use crate::types::{DType, Shape};

#[test]
fn neighbours_are_copied_at_once() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?)?;
    let (buffer, other) = (gpu.buffer(1 << 16, "a")?, gpu.buffer(256, "b")?);
    let vector = |buffer: &Buffer, offset: u64, len: usize| {
        let layout = Layout::of(&Shape::new(&[len])?, DType::F32)?;
        Tensor::from_slice(buffer.slice(offset, layout.size_bytes())?, layout)
    };
    let tensors = [
        vector(&buffer, 0, 4)?,
        vector(&buffer, 256, 70)?,
        // 512 bytes of somebody else's are between them.
        vector(&buffer, 1280, 4)?,
        vector(&other, 0, 4)?,
    ];
    let mut bundle = Bundle::new(&gpu, "test");
    for tensor in &tensors {
        bundle.write(tensor);
    }
    let sizes: Vec<u64> = bundle.uploads.iter().map(|to| to.size).collect();
    assert_eq!(sizes, [256 + 288, 16, 16]);
    let far = vector(&buffer, 1 << 15, 4)?;
    let results = [&tensors[2], &far, &tensors[0], &tensors[3], &tensors[0]];
    let slices = results.map(|tensor| tensor.slice().clone());
    let ranges = bundle.read(&slices);
    assert_eq!(bundle.reads.len(), 3, "{:?}", bundle.reads);

    let turn = bundle.turn()?;
    turn.write(0, &[1.0_f32, 2.0, 3.0, 4.0])?;
    turn.write(1, &[0.5_f32; 70])?;
    turn.write(2, &[5.0_f32; 4])?;
    turn.write(3, &[6.0_f32; 4])?;
    let mut transfer = turn.submit(std::iter::empty(), |_| ())?.expect("results");
    transfer.wait()?;
    let read = |bytes: &[u8]| Ok(bytemuck::cast_slice::<u8, f32>(bytes).to_vec());
    let first = [1.0, 2.0, 3.0, 4.0];
    for (number, expected) in [(0, [5.0; 4]), (2, first), (3, [6.0; 4]), (4, first)] {
        let result = transfer.download().read(ranges[number].clone(), read)?;
        assert_eq!(result, expected, "{number}");
    }
    Ok(())
}

#[test]
fn a_turn_that_is_dropped_is_the_next() -> Result<()> {
    for options in [
        GpuOptions::from_env()?,
        GpuOptions::from_env()?.baseline(true),
    ] {
        let gpu = Gpu::new(&options)?;
        let layout = Layout::of(&Shape::new(&[4])?, DType::F32)?;
        let mut bundle = Bundle::new(&gpu, "test");
        let tensor = match gpu.capabilities().mappable_storage {
            true => {
                let buffers = (0..IN_FLIGHT)
                    .map(|_| gpu.writable_buffer(512, "inputs"))
                    .collect::<Result<Vec<_>>>()?;
                bundle.read_in_place(&buffers);
                Tensor::from_slice(buffers[0].slice(256, layout.size_bytes())?, layout)?
            }
            false => Tensor::zeroed(&gpu, layout)?,
        };
        bundle.write(&tensor);
        let [range] = <[_; 1]>::try_from(bundle.read(&[tensor.slice().clone()])).unwrap();
        let mut made = 0;
        for i in 1..=2 * IN_FLIGHT {
            drop(bundle.turn()?);
            let turn = bundle.turn()?;
            turn.write(0, &[-1.0_f32; 4])?;
            drop(turn);
            let turn = bundle.turn()?;
            turn.write(0, &[i as f32; 4])?;
            let transfer = turn.submit(std::iter::empty(), |_| ())?;
            let mut transfer = transfer.expect("there is something to read");
            transfer.wait()?;
            let read = |bytes: &[u8]| Ok(bytemuck::cast_slice::<u8, f32>(bytes).to_vec());
            let result = transfer.download().read(range.clone(), read)?;
            assert_eq!(result, [i as f32; 4]);
            let now = gpu.report().staging_buffers;
            assert!(i == 1 || now == made, "{made} {now}");
            made = now;
        }
    }
    Ok(())
}
