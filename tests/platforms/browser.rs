//! The WGSL of every kernel of the WebGPU baseline, accepted by a headless browser.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::cases;

const PAGE: &str = r#"<!doctype html><script>
(async () => {
    const told = [];
    const tell = (text) => fetch('/result', { method: 'POST', body: text });
    try {
        const adapter = await navigator.gpu.requestAdapter();
        const device = await adapter.requestDevice();
        const kernels = await (await fetch('/kernels')).json();
        let good = 0;
        for (const kernel of kernels) {
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
                told.push([kernel.key, error.message, ...of_module].join('\n'));
            }
        }
        const { vendor, architecture, description } = adapter.info;
        await tell(JSON.stringify({ good, told, adapter: [vendor, architecture, description].join(' ') }));
    } catch (error) {
        await tell(JSON.stringify({ good: 0, told: ['' + error], adapter: '' }));
    }
})();
</script>"#;

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
    let kernels: Vec<serde_json::Value> = cases()
        .iter()
        .filter(|case| !case.wgsl.contains("enable "))
        .map(|case| {
            let parsed = super::translate::parse(&case.wgsl).unwrap();
            let bindings = parsed.bindings.iter().map(|used| match used.written {
                true => "storage",
                false => "read-only-storage",
            });
            let bindings: Vec<&str> = bindings.collect();
            serde_json::json!({ "key": case.key, "wgsl": case.wgsl, "bindings": bindings })
        })
        .collect();
    let count = kernels.len();
    assert!(count > 0);
    let kernels = serde_json::to_string(&kernels).unwrap();
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
    let result = serve(
        &listener,
        &kernels,
        Instant::now() + Duration::from_secs(900),
    );
    let _ = child.kill();
    let _ = child.wait();
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    println!(
        "{} of {count} kernels accepted by {}",
        result["good"], result["adapter"]
    );
    let told = result["told"].as_array().unwrap();
    let first: Vec<&str> = told
        .iter()
        .take(5)
        .filter_map(|text| text.as_str())
        .collect();
    assert!(told.is_empty(), "{}", first.join("\n\n"));
    assert_eq!(result["good"], count);
}

/// Answers requests until the page tells its result.
fn serve(listener: &TcpListener, kernels: &str, until: Instant) -> String {
    listener.set_nonblocking(true).unwrap();
    loop {
        assert!(Instant::now() < until, "the browser tells nothing");
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        stream.set_nonblocking(false).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut first = String::new();
        reader.read_line(&mut first).unwrap();
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap() == 0 || header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let (kind, content) = match first.split(' ').nth(1) {
            Some("/kernels") => ("application/json", kernels),
            Some("/") => ("text/html", PAGE),
            _ => ("text/plain", ""),
        };
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{content}",
            content.len()
        );
        if first.starts_with("POST /result") {
            return String::from_utf8(body).unwrap();
        }
    }
}
