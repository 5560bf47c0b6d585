//! How an example starts and ends: log, arguments, errors.

use std::error::Error;
use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

/// What an example returns.
pub type Outcome = Result<(), Box<dyn Error>>;

/// Sets up the log, parses the arguments and runs `run`. An error is one line on stderr, and the exit code is 1.
/// After an [`ErrorKind::Interrupted`] the exit code is 130, as shells report Ctrl-C, and nothing is printed.
///
/// The log goes to stderr: messages of energyflow from level info on, warnings of everything else. RUST_LOG changes that.
pub fn main<Options: Parser>(run: impl FnOnce(Options) -> Outcome) -> ExitCode {
    let filter = env_logger::Env::default().default_filter_or("energyflow=info,warn");
    env_logger::init_from_env(filter);
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // As in `encode … | head`: whoever reads the results has had enough.
        Err(error) if is(&*error, ErrorKind::BrokenPipe) => ExitCode::SUCCESS,
        Err(error) if is(&*error, ErrorKind::Interrupted) => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is(error: &(dyn Error + 'static), kind: ErrorKind) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == kind)
}
