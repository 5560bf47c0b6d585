//! clang compiles Metal's kernels against the shim in `tests/msl/shim`, several in a library.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::super::translate::Use;
use super::Mode;

/// Kernels per translation unit.
const TOGETHER: usize = 12;

/// Where a kernel was compiled to.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub library: PathBuf,
    pub symbol: String,
}

type Outcome = Result<Compiled, String>;

/// A kernel that is compiled, or will be.
pub struct Entry {
    pub uses: Vec<Use>,
    /// Dispatches so far.
    pub dispatches: AtomicUsize,
    outcome: Mutex<Option<Outcome>>,
    known: Condvar,
}

struct Job {
    symbol: String,
    body: String,
    entry: Arc<Entry>,
}
/// Compiles kernels, many at a time, in threads of its own.
pub struct Compiler {
    mode: Mode,
    clang: String,
    /// Compiled kernels, by mode and content, shared by all processes.
    pub folder: PathBuf,
    /// By symbol: texts that differ may be one in Metal's language.
    symbols: Mutex<HashMap<String, Arc<Entry>>>,
    queue: Mutex<Vec<Job>>,
    waiting: Condvar,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads that compile, and that run recorded dispatches.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/msl")
}
/// Folder for everything that is compiled.
pub fn folder() -> PathBuf {
    let asked = std::env::var_os("ENERGYFLOW_STAND_IN_DIR").map(PathBuf::from);
    asked.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stand_in"))
}
/// The first of these programs that there is, in a version that knows `_Float16` on this machine.
fn clang() -> String {
    let asked = std::env::var("CLANG").ok();
    let known = [
        "clang++-19",
        "clang++-18",
        "clang++-17",
        "clang++-16",
        "clang++",
    ];
    let found = asked
        .into_iter()
        .chain(known.map(str::to_owned))
        .find(|name| {
            let version = Command::new(name).arg("-dumpversion").output();
            version.is_ok_and(|output| {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let major = text.split('.').next().and_then(|n| n.trim().parse().ok());
                major.is_some_and(|major: u32| major >= 16)
            })
        });
    found.unwrap_or_else(|| panic!("clang 16 or newer is missing (package clang-19, or CLANG=…)"))
}

pub fn hash(parts: &[&[u8]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// A name that no other process and thread uses.
pub fn unique(extension: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}.{extension}", std::process::id())
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let lines: Vec<&str> = text.lines().take(30).collect();
            Err(format!("{command:?}: {}", lines.join("\n")))
        }
    }
}

const FLAGS: [&str; 12] = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    // Literals are floats in Metal.
    "-Xclang",
    "-cl-single-precision-constant",
    "-Wno-unknown-attributes",
    "-Wno-duplicate-decl-specifier",
    "-Wno-tautological-compare",
    "-Wno-everything",
    "-fno-math-errno",
    "-fno-caret-diagnostics",
    // A header that was written again with the same content is the same one.
    "-fpch-validate-input-files-content",
];
impl Compiler {
    /// Makes what every kernel needs, and begins to wait for kernels.
    ///
    /// # Errors
    /// What clang says.
    pub fn start(mode: Mode) -> Result<Arc<Self>, String> {
        let files = ["shim/metal_stdlib", "runtime.cpp", "runtime.ignore"];
        let texts: Vec<Vec<u8>> = files
            .iter()
            .map(|file| std::fs::read(sources().join(file)).expect("a source of this crate"))
            .collect();
        let texts: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
        let clang = clang();
        // Another version does not read its precompiled headers.
        let described = Command::new(&clang).arg("--version").output();
        let version = hash(&[
            hash(&texts).to_le_bytes().as_slice(),
            clang.as_bytes(),
            &described.map(|output| output.stdout).unwrap_or_default(),
            FLAGS.concat().as_bytes(),
        ]);
        let compiler = Arc::new(Self {
            mode,
            clang,
            folder: folder().join(format!("{mode:?}-{version:016x}")),
            symbols: Mutex::default(),
            queue: Mutex::default(),
            waiting: Condvar::new(),
        });
        compiler.prepare()?;
        for _ in 0..cores() {
            let compiler = Arc::clone(&compiler);
            std::thread::spawn(move || compiler.work());
        }
        Ok(compiler)
    }

    /// Begins to compile Metal's text, unless it is known.
    pub fn enqueue(&self, text: &str, glue: &str, uses: Vec<Use>) -> Arc<Entry> {
        let symbol = format!("k{:016x}", hash(&[text.as_bytes(), glue.as_bytes()]));
        let mut symbols = lock(&self.symbols);
        if let Some(entry) = symbols.get(&symbol) {
            return Arc::clone(entry);
        }
        let known = self.known(&symbol).map(|library| {
            let symbol = symbol.clone();
            Ok(Compiled { library, symbol })
        });
        let waits = known.is_none();
        let entry = Arc::new(Entry {
            uses,
            dispatches: AtomicUsize::new(0),
            outcome: Mutex::new(known),
            known: Condvar::new(),
        });
        symbols.insert(symbol.clone(), Arc::clone(&entry));
        if waits {
            // Includes are in the precompiled header.
            let lines = text.lines().filter(|line| !line.starts_with("#include"));
            let text: Vec<&str> = lines.collect();
            let body = format!(
                "namespace n{symbol} {{\n{}\n{glue}}}\nextern \"C\" __attribute__((visibility(\"default\"))) const shim::Kernel {symbol} = n{symbol}::described;\n",
                text.join("\n")
            );
            let job = Job {
                symbol,
                body,
                entry: Arc::clone(&entry),
            };
            lock(&self.queue).push(job);
            self.waiting.notify_one();
        }
        entry
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.clang);
        command.args(FLAGS).args(self.mode.flags().0);
        command
    }

    fn header(&self) -> PathBuf {
        self.folder.join("metal_stdlib.pch")
    }

    pub fn runtime(&self) -> PathBuf {
        self.folder.join("runtime")
    }

    /// Makes a file unless it is there, whole or not at all.
    fn make(
        &self,
        file: &Path,
        make: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<(), String> {
        if file.exists() {
            return Ok(());
        }
        let part = file.with_extension(unique("part"));
        make(&part)?;
        std::fs::rename(&part, file).map_err(|error| format!("{}: {error}", file.display()))
    }

    fn prepare(&self) -> Result<(), String> {
        let sources = sources();
        std::fs::create_dir_all(&self.folder).map_err(|error| error.to_string())?;
        self.make(&self.header(), |part| {
            let header = sources.join("shim/metal_stdlib");
            run(self
                .command()
                .args(["-x", "c++-header"])
                .arg(header)
                .arg("-o")
                .arg(part))
        })?;
        self.make(&self.runtime(), |part| {
            let ignored = sources.join("runtime.ignore");
            let mut command = Command::new(&self.clang);
            command
                .args(["-std=c++20", "-O1", "-g1", "-rdynamic"])
                .args(self.mode.flags().1)
                .arg(format!("-fsanitize-ignorelist={}", ignored.display()))
                .arg("-I")
                .arg(sources.join("shim"))
                .arg(sources.join("runtime.cpp"))
                .arg("-o")
                .arg(part)
                .arg("-ldl");
            run(&mut command)
        })
    }

    /// Compiles these kernels to one library.
    fn compile(&self, jobs: &[Job]) -> Result<PathBuf, String> {
        let bodies: Vec<&[u8]> = jobs.iter().map(|job| job.body.as_bytes()).collect();
        let library = self.folder.join(format!("{:016x}.so", hash(&bodies)));
        self.make(&library, |part| {
            let text = library.with_extension(unique("cpp"));
            let bodies: Vec<&str> = jobs.iter().map(|job| &*job.body).collect();
            std::fs::write(&text, bodies.join("\n")).map_err(|error| error.to_string())?;
            let made = run(self
                .command()
                .arg("-include-pch")
                .arg(self.header())
                .arg("-shared")
                .arg(&text)
                .arg("-o")
                .arg(part));
            // Kept where it failed, to be looked at.
            if made.is_ok() {
                let _ = std::fs::remove_file(&text);
            }
            made
        })?;
        for job in jobs {
            let name = library.file_name().map(|name| name.to_string_lossy());
            let name = name.unwrap_or_default().into_owned();
            self.make(&self.index(&job.symbol), |part| {
                std::fs::write(part, name.as_bytes()).map_err(|error| error.to_string())
            })?;
        }
        Ok(library)
    }

    /// The file that names the library of a kernel.
    fn index(&self, symbol: &str) -> PathBuf {
        self.folder.join(format!("{symbol}.at"))
    }

    /// The library of a kernel that some process has compiled.
    fn known(&self, symbol: &str) -> Option<PathBuf> {
        let name = std::fs::read_to_string(self.index(symbol)).ok()?;
        let library = self.folder.join(name);
        library.exists().then_some(library)
    }

    /// Compiles what is queued, for ever.
    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            while queue.is_empty() {
                queue = self
                    .waiting
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let many = queue.len().div_ceil(cores()).min(TOGETHER);
            let jobs: Vec<Job> = queue.drain(..many).collect();
            drop(queue);
            match self.compile(&jobs) {
                Ok(library) => jobs.iter().for_each(|job| job.done(Ok(&library))),
                // Which of them it was.
                Err(_) if jobs.len() > 1 => {
                    for job in jobs {
                        let made = self.compile(std::slice::from_ref(&job));
                        job.done(made.as_deref().map_err(Clone::clone));
                    }
                }
                Err(reason) => jobs.iter().for_each(|job| job.done(Err(reason.clone()))),
            }
        }
    }
}

impl Job {
    fn done(&self, made: Result<&Path, String>) {
        let outcome = made.map(|library| Compiled {
            library: library.to_owned(),
            symbol: self.symbol.clone(),
        });
        *lock(&self.entry.outcome) = Some(outcome);
        self.entry.known.notify_all();
    }
}

impl Entry {
    /// Waits until the kernel is compiled.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self
                .known
                .wait(outcome)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
