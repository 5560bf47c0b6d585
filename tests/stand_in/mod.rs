//! Other ways to compute the kernels of a test program than the adapter's, chosen by `ENERGYFLOW_STAND_IN`:
//!
//! - `metal`: as on a Mac. The device is taken for one, kernels are translated to Metal's language, compiled by clang against a shim of
//!   Metal's library and executed on the CPU (`metal.rs`).
//! - `direct3d`: kernels are translated to HLSL, compiled by the DirectX shader compiler to SPIR-V and executed by the adapter (`dxc.rs`);
//!   those whose SPIR-V the compiler is known to get wrong are the adapter's.
//! - unset: the adapter computes.
//!
//! `ENERGYFLOW_RECORD=DIR` writes one dispatch of each distinct kernel to a folder (`record.rs`).
#![allow(dead_code, reason = "every test program uses its part")]
#![allow(clippy::panic, reason = "a test fails here")]

pub mod dxc;
pub mod metal;
pub mod record;
pub mod translate;

use energyflow::gpu::trace::{self, Disguise, Kernel, Made, StandIn};

use metal::Metal;
use record::Record;

/// Installs what the environment asks for. Called before a device is opened.
pub fn prepare() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(install);
}

fn install() {
    let name = std::env::var("ENERGYFLOW_STAND_IN").unwrap_or_default();
    let way = match &*name {
        "" => Way::Adapter,
        "metal" => Way::Metal(Metal::from_env()),
        "direct3d" => Way::Direct3d,
        other => panic!("ENERGYFLOW_STAND_IN={other}: neither metal nor direct3d"),
    };
    let record = std::env::var_os("ENERGYFLOW_RECORD").map(|dir| Record::new(dir.into()));
    if matches!(way, Way::Adapter) && record.is_none() {
        return;
    }
    trace::install(|| Box::new(Chosen { way, record }));
}

enum Way {
    Adapter,
    Metal(Metal),
    Direct3d,
}

struct Chosen {
    way: Way,
    record: Option<Record>,
}

impl StandIn for Chosen {
    fn disguise(&self, disguise: Disguise<'_>) {
        if let Way::Metal(_) = &self.way {
            metal::disguise(disguise);
        }
    }

    fn make(&self, kernel: Kernel<'_>) -> Result<Made, String> {
        match &self.way {
            Way::Adapter => Ok(Made::Adapter),
            Way::Metal(metal) => metal.prepare(kernel.wgsl).map(|()| Made::StandIn),
            Way::Direct3d if dxc::misreads(kernel.wgsl) => Ok(Made::Adapter),
            Way::Direct3d => dxc::spirv(kernel.wgsl).map(Made::Spirv),
        }
    }

    fn run(
        &self,
        kernel: Kernel<'_>,
        workgroups: [u32; 3],
        memory: &mut [Vec<u8>],
    ) -> Result<(), String> {
        let Way::Metal(metal) = &self.way else {
            return Err("the adapter should run it".to_owned());
        };
        let before = self.watches(kernel).then(|| memory.to_vec());
        metal.run(kernel.wgsl, workgroups, memory)?;
        if let Some(before) = before {
            self.watch(kernel, workgroups, &before, memory);
        }
        Ok(())
    }

    fn watches(&self, kernel: Kernel<'_>) -> bool {
        let record = self.record.as_ref();
        record.is_some_and(|record| record.wants(kernel.wgsl))
    }

    fn watch(
        &self,
        kernel: Kernel<'_>,
        workgroups: [u32; 3],
        before: &[Vec<u8>],
        after: &[Vec<u8>],
    ) {
        if let Some(record) = &self.record {
            record.keep(kernel, workgroups, before, after);
        }
    }
}
