//! The DirectX shader compiler: the program that `scripts/dxc` builds.

use std::io::{BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use super::translate;

/// As wgpu-hal's `dx12/shader_compilation.rs`, with 16-bit types. It takes any message for an error.
const ARGUMENTS: [&str; 9] = [
    "-E",
    "main",
    "-T",
    "cs_6_2",
    "-HV",
    "2018",
    "-no-warnings",
    "-Ges",
    "-enable-16bit-types",
];

static IDLE: Mutex<Vec<Compiler>> = Mutex::new(Vec::new());

struct Compiler {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Compiler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the SPIR-V of a kernel reads single numbers in f16, which this compiler takes from the even index below
/// (<https://github.com/microsoft/DirectXShaderCompiler/issues/5475>). DXIL does not have the fault.
pub fn misreads(wgsl: &str) -> bool {
    wgsl.contains(": array<f16>;")
}

/// SPIR-V that the compiler makes of a kernel's HLSL.
///
/// # Errors
/// What naga or the compiler refuses.
pub fn spirv(wgsl: &str) -> Result<Vec<u32>, String> {
    let hlsl = translate::direct3d(&translate::parse(wgsl)?, true)?;
    let object = compile(&hlsl, &["-spirv", "-fspv-target-env=vulkan1.1"])?;
    let words = object.chunks_exact(4);
    let words = words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    Ok(words.collect())
}

/// DXIL that the compiler makes of a kernel's HLSL, as for Direct3D 12. It is not signed.
///
/// # Errors
/// What naga or the compiler refuses.
pub fn dxil(wgsl: &str) -> Result<Vec<u8>, String> {
    compile(&translate::direct3d(&translate::parse(wgsl)?, false)?, &[])
}

fn folder() -> PathBuf {
    let cache = || {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        cache.unwrap_or_else(home).join("energyflow/dxc")
    };
    std::env::var_os("DXC_DIR").map_or_else(cache, PathBuf::from)
}

fn compile(hlsl: &str, more: &[&str]) -> Result<Vec<u8>, String> {
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = idle().pop();
    let mut compiler = match taken {
        Some(compiler) => compiler,
        None => Compiler::start()?,
    };
    let ended = |error| format!("the DirectX shader compiler ended: {error}\n{hlsl}");
    let (success, messages, object) = compiler.ask(hlsl, more).map_err(ended)?;
    idle().push(compiler);
    // Signing is done by a library that only Windows has.
    let messages: Vec<&str> = messages
        .lines()
        .filter(|line| !line.is_empty() && !line.contains("will not be signed"))
        .collect();
    let messages = messages.join("\n");
    match success && messages.is_empty() {
        true => Ok(object),
        false => Err(format!("DXC: {messages}\n{hlsl}")),
    }
}

impl Compiler {
    fn start() -> Result<Self, String> {
        let folder = folder();
        let mut child = Command::new(folder.join("dxc"))
            .env("LD_LIBRARY_PATH", &folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| {
                format!(
                    "{}: {error}; scripts/dxc setup fetches it",
                    folder.display()
                )
            })?;
        let missing = || "the compiler has no pipes".to_owned();
        Ok(Self {
            requests: child.stdin.take().ok_or_else(missing)?,
            answers: BufReader::new(child.stdout.take().ok_or_else(missing)?),
            child,
        })
    }

    fn ask(&mut self, hlsl: &str, more: &[&str]) -> std::io::Result<(bool, String, Vec<u8>)> {
        let arguments = ARGUMENTS.len() + more.len();
        let mut request = (arguments as u32).to_le_bytes().to_vec();
        for text in ARGUMENTS.iter().chain(more).chain([&hlsl]) {
            request.extend((text.len() as u32).to_le_bytes());
            request.extend(text.as_bytes());
        }
        self.requests.write_all(&request)?;
        self.requests.flush()?;
        let success = self.number()? == 1;
        let messages = String::from_utf8_lossy(&self.bytes()?).into_owned();
        Ok((success, messages, self.bytes()?))
    }

    fn number(&mut self) -> std::io::Result<u32> {
        let mut number = [0; 4];
        self.answers.read_exact(&mut number)?;
        Ok(u32::from_le_bytes(number))
    }

    fn bytes(&mut self) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.number()? as usize];
        self.answers.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
