//! The process that runs compiled kernels, `tests/msl/runtime.cpp`: what a kernel destroys is not the test program.

use std::io::{BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::super::translate::Use;
use super::compiler::{Compiled, Compiler, unique};

/// A process that runs kernels.
pub struct Server {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// What it writes to standard error.
    log: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

impl Server {
    pub fn start(compiler: &Compiler, seconds: u64) -> Result<Self, String> {
        let log = compiler.folder.join(unique("log"));
        let failed = |error: std::io::Error| format!("{}: {error}", compiler.runtime().display());
        let errors = std::fs::File::create(&log).map_err(failed)?;
        let mut child = Command::new(compiler.runtime())
            .arg(seconds.to_string())
            .env(
                "ASAN_OPTIONS",
                "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=0",
            )
            .env("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1")
            .env("MSAN_OPTIONS", "halt_on_error=1")
            .env("TSAN_OPTIONS", "halt_on_error=1:report_thread_leaks=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(failed)?;
        let missing = || "the runtime has no pipes".to_owned();
        Ok(Self {
            requests: child.stdin.take().ok_or_else(missing)?,
            answers: BufReader::new(child.stdout.take().ok_or_else(missing)?),
            child,
            log,
        })
    }

    /// The outer error: the process has ended.
    pub fn ask(
        &mut self,
        kernel: &Compiled,
        workgroups: [u32; 3],
        uses: &[Use],
        memory: &mut [Vec<u8>],
        orders: &[u64],
    ) -> Result<Result<(), String>, String> {
        let mut request = Vec::new();
        for text in [kernel.library.to_string_lossy().as_ref(), &*kernel.symbol] {
            request.extend((text.len() as u32).to_le_bytes());
            request.extend(text.as_bytes());
        }
        workgroups
            .iter()
            .for_each(|n| request.extend(n.to_le_bytes()));
        request.extend((memory.len() as u32).to_le_bytes());
        for (bytes, used) in memory.iter().zip(uses) {
            let flags = u32::from(used.written);
            request.extend((bytes.len() as u64).to_le_bytes());
            request.extend(flags.to_le_bytes());
            request.extend(bytes);
        }
        request.extend((orders.len() as u32).to_le_bytes());
        orders
            .iter()
            .for_each(|order| request.extend(order.to_le_bytes()));
        let ended = |error: std::io::Error| format!("the kernel ended its process: {error}");
        self.requests.write_all(&request).map_err(ended)?;
        self.requests.flush().map_err(ended)?;
        let mut length = [0; 4];
        self.answers.read_exact(&mut length).map_err(ended)?;
        let mut reason = vec![0; u32::from_le_bytes(length) as usize];
        self.answers.read_exact(&mut reason).map_err(ended)?;
        if !reason.is_empty() {
            let reason = String::from_utf8_lossy(&reason).into_owned();
            // The process ends where fibers are left.
            if reason.contains("workgroup") || reason.starts_with("cannot load") {
                return Err(reason);
            }
            return Ok(Err(reason));
        }
        for (bytes, used) in memory.iter_mut().zip(uses) {
            if used.written {
                self.answers.read_exact(bytes).map_err(ended)?;
            }
        }
        Ok(Ok(()))
    }

    /// What it said before it ended.
    pub fn end(mut self) -> String {
        let _ = self.child.wait();
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().take(40).collect();
        lines.join("\n")
    }
}
