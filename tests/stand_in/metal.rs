//! Metal's kernels on the CPU: clang compiles them against the shim in `tests/msl/shim`, and `tests/msl/runtime.cpp` runs them.
//!
//! The first dispatches of a kernel run in several orders of invocations and workgroups, which must all leave the same bytes; later ones, as
//! of a long training, in one of these orders by turns.
//!
//! - `ENERGYFLOW_SANITIZER`: `address` (with undefined behaviour), `memory`, `thread`, or `fast` for `-ffast-math`, as Metal compiles by default.
//! - `ENERGYFLOW_ORDERS`: number of orders, by default 3: in order, reversed, random.
//! - `ENERGYFLOW_SEED`: of the random orders; by default it is drawn, and told when a test fails.

pub mod compiler;
mod server;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use energyflow::gpu::trace::Disguise;
use energyflow::wgpu::{self, CooperativeScalarType, Features};

use super::translate::{self, Use};
use compiler::{Compiler, Entry, hash, lock};
use server::Server;

/// Language version of macOS 14. Its kernels also compile on later systems.
pub const LANGUAGE: (u8, u8) = (3, 1);

/// Dispatches of a kernel that run in all orders.
const IN_ALL_ORDERS: usize = 3;

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
/// Compiles kernels and runs their dispatches.
pub struct Metal {
    compiler: Arc<Compiler>,
    /// By WGSL.
    kernels: Mutex<HashMap<String, Arc<Entry>>>,
    servers: Mutex<Vec<Server>>,
    orders: Vec<u64>,
    /// How long a dispatch may take in all orders.
    seconds: u64,
    /// Whether each dispatch has a process of its own.
    apart: bool,
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
        let compiler = Compiler::start(mode).unwrap_or_else(|reason| panic!("{reason}"));
        let seeds = (0..).map(|i| seed.wrapping_add(i).max(2));
        Self {
            compiler,
            kernels: Mutex::default(),
            servers: Mutex::default(),
            orders: [0, 1].into_iter().chain(seeds).take(orders).collect(),
            seconds: 600,
            apart: false,
        }
    }

    /// Each dispatch in a process of its own: a kernel that writes outside of its buffers may spoil the next one otherwise.
    pub fn apart(mut self) -> Self {
        self.apart = true;
        self
    }

    /// A dispatch that takes longer in all orders together is an error.
    pub fn within(mut self, seconds: u64) -> Self {
        self.seconds = seconds;
        self
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
        let entry = self
            .compiler
            .enqueue(&metal.text, &metal.glue, parsed.bindings);
        lock(&self.kernels).insert(wgsl.to_owned(), Arc::clone(&entry));
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
    pub fn prepare_text(&self, text: &str, glue: &str, uses: &[Use]) {
        self.compiler.enqueue(text, glue, uses.to_vec());
    }

    /// Waits until Metal's text is compiled.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compiled_text(&self, text: &str, glue: &str, uses: &[Use]) -> Result<(), String> {
        let entry = self.compiler.enqueue(text, glue, uses.to_vec());
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
        let entry = self.compiler.enqueue(text, glue, uses.to_vec());
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
            None => Server::start(&self.compiler, self.seconds)?,
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
                if !self.apart {
                    lock(&self.servers).push(server);
                }
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
