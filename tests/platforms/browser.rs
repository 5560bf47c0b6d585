//! The WGSL of every kernel of the WebGPU baseline, accepted by a headless browser.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::cases;

/// Asks for one kernel after the other. A device that is lost is told, and the next kernel gets a new one.
const PAGE: &str = r#"<!doctype html><script>
(async () => {
    const told = [];
    const tell = (text) => fetch('/result', { method: 'POST', body: text });
    try {
        let adapter, device, lost;
        const open = async () => {
            adapter = await navigator.gpu.requestAdapter();
            device = await adapter.requestDevice();
            lost = undefined;
            device.lost.then((info) => { lost = info; });
        };
        await open();
        let good = 0;
        for (let i = 0; ; i++) {
            const kernel = await (await fetch('/kernel/' + i)).json();
            if (!kernel) break;
            if (lost) await open();
            const entries = kernel.bindings.map((type, binding) => ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } }));
            const group = device.createBindGroupLayout({ entries });
            const layout = device.createPipelineLayout({ bindGroupLayouts: [group] });
            const module = device.createShaderModule({ code: kernel.wgsl });
            const { messages } = await module.getCompilationInfo();
            try {
                await device.createComputePipelineAsync({ layout, compute: { module, entryPoint: 'main' } });
                good += 1;
            } catch (error) {
                const lines = kernel.wgsl.split('\n');
                const of_module = messages.map((m) => `${m.lineNum}: ${m.message}: ${lines[m.lineNum - 1]}`);
                const of_device = lost ? ['device lost: ' + lost.message] : [];
                told.push([kernel.key, error.message, ...of_device, ...of_module].join('\n'));
            }
        }
        const { vendor, architecture, description } = adapter.info;
        await tell(JSON.stringify({ good, told, adapter: [vendor, architecture, description].join(' ') }));
    } catch (error) {
        await tell(JSON.stringify({ good: 0, told: ['' + error], adapter: '' }));
    }
})();
</script>"#;

/// For one kernel. The software adapter of the browser compiles some for a minute on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// The browser: `$CHROMIUM`, or one of the usual names.
fn browser() -> String {
    let asked = std::env::var("CHROMIUM").ok();
    let names = ["chromium", "chromium-browser", "google-chrome"].map(str::to_owned);
    let found = asked.into_iter().chain(names).find(|name| {
        let version = Command::new(name).arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    });
    found.expect("no Chromium (package chromium, or CHROMIUM=…)")
}

#[test]
#[ignore = "needs recorded dispatches and Chromium"]
fn a_browser_accepts_every_kernel_of_the_baseline() {
    let kernels: Vec<String> = cases()
        .iter()
        .filter(|case| !case.wgsl.contains("enable ") && invocations(&case.wgsl) <= 256)
        .map(|case| {
            let parsed = super::translate::parse(&case.wgsl).unwrap();
            let bindings = parsed.bindings.iter().map(|used| match used.written {
                true => "storage",
                false => "read-only-storage",
            });
            let bindings: Vec<&str> = bindings.collect();
            let kernel =
                serde_json::json!({ "key": case.key, "wgsl": case.wgsl, "bindings": bindings });
            kernel.to_string()
        })
        .collect();
    let count = kernels.len();
    assert!(count > 0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let profile = tempfile::tempdir().unwrap();
    let mut child = Command::new(browser())
        .args([
            "--headless=new",
            "--no-sandbox",
            "--enable-unsafe-webgpu",
            "--use-webgpu-adapter=swiftshader",
            "--disable-gpu-sandbox",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{}/", listener.local_addr().unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let result = serve(&listener, &kernels, &mut child);
    let _ = child.kill();
    let _ = child.wait();
    let result = result.unwrap_or_else(|reason| panic!("{reason}"));
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    println!(
        "{} of {count} kernels accepted by {}",
        result["good"], result["adapter"]
    );
    let told = result["told"].as_array().unwrap();
    let told: Vec<&str> = told.iter().filter_map(|text| text.as_str()).collect();
    assert!(
        told.is_empty(),
        "{}",
        told[..told.len().min(5)].join("\n\n")
    );
    assert_eq!(result["good"], count);
}

/// Invocations of a workgroup: the baseline has 256 at most.
fn invocations(wgsl: &str) -> u32 {
    let size = wgsl.split("@workgroup_size(").nth(1);
    let size = size.and_then(|text| text.split(')').next());
    let factors = size.unwrap_or_default().split(',');
    factors.map(|n| n.trim().parse().unwrap_or(1)).product()
}

/// Answers requests until the page tells its result.
fn serve(listener: &TcpListener, kernels: &[String], child: &mut Child) -> Result<String, String> {
    listener.set_nonblocking(true).unwrap();
    let (mut asked, mut since, begin) = (0, Instant::now(), Instant::now());
    let at = |asked: usize| {
        let seconds = begin.elapsed().as_secs();
        let kernel = kernels.get(asked).map_or("", String::as_str);
        let kernel: String = kernel.chars().take(300).collect();
        format!(
            "after {seconds} s at kernel {asked} of {}: {kernel}",
            kernels.len()
        )
    };
    loop {
        if since.elapsed() > PATIENCE {
            return Err(format!("the browser tells nothing, {}", at(asked)));
        }
        let Ok((stream, _)) = listener.accept() else {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the browser ended with {status}, {}", at(asked)));
            }
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        // Browsers also open connections that they do not use.
        let Ok((path, body)) = request(&stream) else {
            continue;
        };
        let number = path.strip_prefix("/kernel/");
        let number = number.and_then(|number| number.parse::<usize>().ok());
        let (kind, content) = match (number, &*path) {
            (Some(number), _) => {
                (asked, since) = (number, Instant::now());
                let kernel = kernels.get(number).map_or("null", String::as_str);
                ("application/json", kernel)
            }
            (None, "/") => ("text/html", PAGE),
            _ => ("text/plain", ""),
        };
        let _ = write!(
            &stream,
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{content}",
            content.len()
        );
        if path == "/result" {
            return Ok(body);
        }
    }
}

/// Path and body of a request.
fn request(stream: &TcpStream) -> std::io::Result<(String, String)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    Ok((path, String::from_utf8_lossy(&body).into_owned()))
}
