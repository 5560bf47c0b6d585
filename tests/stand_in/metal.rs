//! Metal's kernels on the CPU: clang compiles them against the shim in `tests/msl/shim`, and `tests/msl/runtime.cpp` runs them.
//!
//! The first dispatches of a kernel run in several orders of invocations and workgroups, which must all leave the same bytes; later ones, as
//! of a long training, in one of these orders by turns.
//!
//! - `ENERGYFLOW_SANITIZER`: `address` (with undefined behaviour), `memory`, `thread`, or `fast` for `-ffast-math`, as Metal compiles by default.
//! - `ENERGYFLOW_ORDERS`: number of orders, by default 3: in order, reversed, random.
//! - `ENERGYFLOW_SEED`: of the random orders; by default it is drawn, and told when a test fails.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use energyflow::gpu::trace::Disguise;
use energyflow::wgpu::{self, CooperativeScalarType, Features};

use super::translate::{self, Use};

/// Language version of macOS 14. Its kernels also compile on later systems.
pub const LANGUAGE: (u8, u8) = (3, 1);

/// Dispatches of a kernel that run in all orders.
const IN_ALL_ORDERS: usize = 3;

/// Kernels per translation unit.
const TOGETHER: usize = 12;

/// Makes the device look like a Mac's. A device of the WebGPU baseline has no optional feature and keeps its limits.
pub fn disguise(disguise: Disguise<'_>) {
    let Disguise {
        info,
        features,
        limits,
        matrices,
        ..
    } = disguise;
    info.name = "Apple M2".to_owned();
    info.backend = wgpu::Backend::Metal;
    info.device_type = wgpu::DeviceType::IntegratedGpu;
    info.subgroup_min_size = 4;
    info.subgroup_max_size = 64;
    // Inputs are copied, which changes no kernel. There is nothing to time.
    features.remove(
        Features::MAPPABLE_PRIMARY_BUFFERS
            | Features::TIMESTAMP_QUERY
            | Features::PIPELINE_CACHE
            // Every device of these tests has it, those of the baseline, too.
            | Features::PASSTHROUGH_SHADERS,
    );
    if features.is_empty() {
        return;
    }
    limits.max_compute_invocations_per_workgroup = 1024;
    limits.max_compute_workgroup_size_x = 1024;
    limits.max_compute_workgroup_storage_size = 32 << 10;
    features.insert(Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    let matrix = |ab_type, cr_type| wgpu::CooperativeMatrixProperties {
        m_size: 8,
        n_size: 8,
        k_size: 8,
        ab_type,
        cr_type,
        saturating_accumulation: false,
    };
    use CooperativeScalarType::{F16, F32};
    *matrices = vec![matrix(F32, F32), matrix(F16, F16), matrix(F16, F32)];
}

/// What the kernels are compiled with besides the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    Plain,
    Fast,
    Address,
    Memory,
    Thread,
}

impl Mode {
    fn from_env() -> Self {
        match &*std::env::var("ENERGYFLOW_SANITIZER").unwrap_or_default() {
            "" => Self::Plain,
            "fast" => Self::Fast,
            "address" => Self::Address,
            "memory" => Self::Memory,
            "thread" => Self::Thread,
            other => panic!("ENERGYFLOW_SANITIZER={other}: address, memory, thread or fast"),
        }
    }

    /// Flags of kernels, and those of the runtime.
    fn flags(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Plain => (&[], &[]),
            Self::Fast => (&["-ffast-math"], &[]),
            // Arrays of bindings are declared with one element.
            Self::Address => (
                &[
                    "-g1",
                    "-fsanitize=address,undefined",
                    "-fno-sanitize=array-bounds",
                    "-fno-sanitize-recover=all",
                ],
                &["-fsanitize=address,undefined"],
            ),
            Self::Memory => (&["-g1", "-fsanitize=memory"], &["-fsanitize=memory"]),
            Self::Thread => (&["-g1", "-fsanitize=thread"], &["-fsanitize=thread"]),
        }
    }
}

/// Where a kernel was compiled to.
#[derive(Clone, Debug)]
struct Compiled {
    library: PathBuf,
    symbol: String,
}

type Outcome = Result<Compiled, String>;

/// A kernel that is compiled, or will be.
struct Entry {
    uses: Vec<Use>,
    /// Dispatches so far.
    dispatches: AtomicUsize,
    outcome: Mutex<Option<Outcome>>,
    known: Condvar,
}

struct Job {
    symbol: String,
    body: String,
    entry: Arc<Entry>,
}

/// Compiles kernels and runs their dispatches.
pub struct Metal {
    shared: Arc<Shared>,
    /// By WGSL.
    kernels: Mutex<HashMap<String, Arc<Entry>>>,
    /// By symbol: texts that differ may be one in Metal's language.
    symbols: Mutex<HashMap<String, Arc<Entry>>>,
    servers: Mutex<Vec<Server>>,
    orders: Vec<u64>,
}

struct Shared {
    mode: Mode,
    clang: String,
    /// Compiled kernels, by mode and content, shared by all processes.
    folder: PathBuf,
    queue: Mutex<Vec<Job>>,
    waiting: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

fn hash(parts: &[&[u8]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// A name that no other process and thread uses.
fn unique(extension: &str) -> String {
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

impl Shared {
    fn compiler(&self) -> Command {
        let mut command = Command::new(&self.clang);
        command.args(FLAGS).args(self.mode.flags().0);
        command
    }

    fn header(&self) -> PathBuf {
        self.folder.join("metal_stdlib.pch")
    }

    fn runtime(&self) -> PathBuf {
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
                .compiler()
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
                .compiler()
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
    fn wait(&self) -> Outcome {
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

/// Seed of the random orders of this process.
pub fn seed() -> u64 {
    let asked = std::env::var("ENERGYFLOW_SEED").ok();
    let asked = asked.map(|text| text.parse().expect("ENERGYFLOW_SEED: a number"));
    let drawn = || hash(&[&std::process::id().to_le_bytes(), &time()]);
    // 0 and 1 are no seeds but orders.
    asked.unwrap_or_else(drawn).max(2)
}

fn time() -> [u8; 16] {
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos()).to_le_bytes()
}

impl Metal {
    pub fn from_env() -> Self {
        let count = std::env::var("ENERGYFLOW_ORDERS").ok();
        let count = count.map_or(3, |text| text.parse().expect("ENERGYFLOW_ORDERS: a number"));
        Self::new(Mode::from_env(), count, seed())
    }

    /// In `orders` orders: in order, reversed, and random ones from this seed on.
    pub fn new(mode: Mode, orders: usize, seed: u64) -> Self {
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
        let folder = folder().join(format!("{mode:?}-{version:016x}"));
        let shared = Arc::new(Shared {
            mode,
            clang,
            folder,
            queue: Mutex::default(),
            waiting: Condvar::new(),
        });
        if let Err(reason) = shared.prepare() {
            panic!("{reason}");
        }
        for _ in 0..cores() {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.work());
        }
        let seeds = (0..).map(|i| seed.wrapping_add(i).max(2));
        Self {
            shared,
            kernels: Mutex::default(),
            symbols: Mutex::default(),
            servers: Mutex::default(),
            orders: [0, 1].into_iter().chain(seeds).take(orders).collect(),
        }
    }

    /// Begins to compile a kernel, unless it is known.
    ///
    /// # Errors
    /// What naga does not translate.
    pub fn prepare(&self, wgsl: &str) -> Result<(), String> {
        self.entry(wgsl).map(drop)
    }

    fn entry(&self, wgsl: &str) -> Result<Arc<Entry>, String> {
        if let Some(entry) = lock(&self.kernels).get(wgsl) {
            return Ok(Arc::clone(entry));
        }
        let parsed = translate::parse(wgsl)?;
        let metal = translate::metal(&parsed, LANGUAGE)?;
        let entry = self.enqueue(&metal.text, &metal.glue, parsed.bindings)?;
        lock(&self.kernels).insert(wgsl.to_owned(), Arc::clone(&entry));
        Ok(entry)
    }

    fn enqueue(&self, text: &str, glue: &str, uses: Vec<Use>) -> Result<Arc<Entry>, String> {
        let symbol = format!("k{:016x}", hash(&[text.as_bytes(), glue.as_bytes()]));
        let mut symbols = lock(&self.symbols);
        if let Some(entry) = symbols.get(&symbol) {
            return Ok(Arc::clone(entry));
        }
        let known = self.shared.known(&symbol).map(|library| {
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
            lock(&self.shared.queue).push(job);
            self.shared.waiting.notify_one();
        }
        Ok(entry)
    }

    /// Runs a dispatch in all orders. What they leave replaces `memory`.
    ///
    /// # Errors
    /// An order that leaves something else, a barrier that not all invocations reach, an access outside of a buffer, …
    pub fn run(
        &self,
        wgsl: &str,
        workgroups: [u32; 3],
        memory: &mut [Vec<u8>],
    ) -> Result<(), String> {
        let entry = self.entry(wgsl)?;
        self.dispatch(&entry, workgroups, memory)
    }

    /// As [`Metal::prepare`], of Metal's text.
    ///
    /// # Errors
    /// None.
    pub fn prepare_text(&self, text: &str, glue: &str, uses: &[Use]) -> Result<(), String> {
        self.enqueue(text, glue, uses.to_vec()).map(drop)
    }

    /// Waits until Metal's text is compiled.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compiled_text(&self, text: &str, glue: &str, uses: &[Use]) -> Result<(), String> {
        let entry = self.enqueue(text, glue, uses.to_vec())?;
        entry.wait().map(drop)
    }

    /// As [`Metal::run`], of Metal's text: for mutants.
    ///
    /// # Errors
    /// As [`Metal::run`].
    pub fn run_text(
        &self,
        text: &str,
        glue: &str,
        uses: &[Use],
        workgroups: [u32; 3],
        memory: &mut [Vec<u8>],
    ) -> Result<(), String> {
        let entry = self.enqueue(text, glue, uses.to_vec())?;
        self.dispatch(&entry, workgroups, memory)
    }

    fn dispatch(
        &self,
        entry: &Entry,
        workgroups: [u32; 3],
        memory: &mut [Vec<u8>],
    ) -> Result<(), String> {
        let compiled = entry.wait()?;
        let idle = lock(&self.servers).pop();
        let mut server = match idle {
            Some(server) => server,
            None => Server::start(&self.shared)?,
        };
        let number = entry.dispatches.fetch_add(1, Ordering::Relaxed);
        let one = number % self.orders.len();
        let orders = match number < IN_ALL_ORDERS {
            true => &self.orders[..],
            false => &self.orders[one..=one],
        };
        let seed = self.orders.get(2);
        match server.ask(&compiled, workgroups, &entry.uses, memory, orders) {
            Ok(answer) => {
                lock(&self.servers).push(server);
                answer.map_err(|reason| format!("{reason} (seed {seed:?}, {compiled:?})"))
            }
            // It has ended.
            Err(error) => {
                let told = server.end();
                Err(format!("{error} (seed {seed:?}, {compiled:?})\n{told}"))
            }
        }
    }
}

/// A process that runs kernels.
struct Server {
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
    fn start(shared: &Shared) -> Result<Self, String> {
        let log = shared.folder.join(unique("log"));
        let failed = |error: std::io::Error| format!("{}: {error}", shared.runtime().display());
        let errors = std::fs::File::create(&log).map_err(failed)?;
        let mut child = Command::new(shared.runtime())
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
    fn ask(
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
    fn end(mut self) -> String {
        let _ = self.child.wait();
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().take(40).collect();
        lines.join("\n")
    }
}
