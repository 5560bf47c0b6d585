//! Cases that are no graph: calls of the library, timed on the host, and what they consist of.

use energyflow::{DType, Gpu};
use serde::Serialize;

use crate::measure::Failure;

/// A named use of the library.
pub struct Wall {
    /// What it is selected by.
    pub name: &'static str,
    /// Measures it, with f16 or f32 activations, for about so many seconds.
    pub run: fn(&Gpu, DType, f64) -> Result<Vec<Row>, Failure>,
}

/// One figure of a case.
#[derive(Serialize)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Median.
    pub value: f64,
    /// Unit of `value`.
    pub unit: &'static str,
    /// The least that it could be, in the same unit, measured beside it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor: Option<f64>,
}

impl Row {
    pub fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            what: what.into(),
            value,
            unit,
            floor: None,
        }
    }

    pub fn floor(self, floor: f64) -> Self {
        Self {
            floor: Some(floor),
            ..self
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    case: &'a str,
    dtype: String,
    device: &'a str,
    #[serde(flatten)]
    row: &'a Row,
}

/// Prints what a case gave, as a table or as lines of JSON.
pub fn print(
    gpu: &Gpu,
    case: &Wall,
    dtype: DType,
    json: bool,
    result: &Result<Vec<Row>, Failure>,
) -> Result<(), Failure> {
    let rows = match result {
        Ok(rows) => rows,
        Err(failure) => {
            println!("{:16} {:5} {failure}", case.name, dtype.to_string());
            return Ok(());
        }
    };
    for row in rows {
        if json {
            let line = Line {
                case: case.name,
                dtype: dtype.to_string(),
                device: &gpu.capabilities().adapter,
                row,
            };
            println!("{}", serde_json::to_string(&line)?);
            continue;
        }
        let floor = row.floor.map(|floor| {
            format!(
                ", {:.2} times the floor of {floor:.4} {}",
                row.value / floor,
                row.unit
            )
        });
        println!(
            "{:16} {:5} {}: {:.4} {}{}",
            case.name,
            dtype.to_string(),
            row.what,
            row.value,
            row.unit,
            floor.unwrap_or_default()
        );
    }
    Ok(())
}

/// The median of times, in milliseconds, of calls for about `seconds`, at least 20, after some that are not counted.
pub fn median_milliseconds(
    seconds: f64,
    mut call: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    use std::time::Instant;
    for _ in 0..5 {
        call()?;
    }
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 20 || begin.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        call()?;
        times.push(1e3 * start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
