//! Curves as SVG.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::curves::{Curves, Series};
use crate::error::{Error, Result};
use crate::file::AtomicFile;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T = ()> = Result<T, DrawingAreaErrorKind<std::io::Error>>;

/// Size of one picture in pixels.
const WIDTH: u32 = 900;
const HEIGHT: u32 = 320;

/// Series of more points are drawn smoothed.
const SMOOTH_ABOVE: usize = 200;

/// Series of up to this many points get a dot for each.
const DOTS_UP_TO: usize = 50;

/// Points of a line in a picture; more cannot be told apart.
const MOST_POINTS: usize = 1500;

/// Larger values are drawn as this one: differences of f64 must not overflow.
const LARGEST: f64 = 1e300;

/// Colours that readers with colour-vision deficiencies can tell apart (Okabe and Ito).
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(60, 60, 60),
];

pub(super) fn draw_svg(curves: &Curves, path: &Path) -> Result<()> {
    let panels = panels(curves);
    if panels.is_empty() {
        return Err(Error::Data {
            name: "curves".into(),
            reason: "nothing was recorded that could be drawn".into(),
        });
    }
    let mut svg = String::new();
    let size = (WIDTH, HEIGHT * panels.len() as u32);
    let mut draw = || -> Drawn {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        for (area, (title, all)) in area.split_evenly((panels.len(), 1)).iter().zip(&panels) {
            panel(area, title, all)?;
        }
        area.present()
    };
    let drawn = draw();
    drawn.map_err(|error| Error::io(path, std::io::Error::other(error.to_string())))?;
    let mut file = AtomicFile::create(path)?;
    file.write(svg.as_bytes())?;
    file.commit()
}

/// The part of a name after the last slash.
fn title(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Series that belong together, under their title.
fn panels(curves: &Curves) -> Vec<(&str, Vec<&Series>)> {
    let mut panels: Vec<(&str, Vec<&Series>)> = Vec::new();
    for series in &curves.all {
        let title = title(&series.name);
        match panels.iter_mut().find(|panel| panel.0 == title) {
            Some(panel) => panel.1.push(series),
            None => panels.push((title, vec![series])),
        }
    }
    if curves.panels.is_empty() {
        return panels;
    }
    let wanted = curves.panels.iter();
    wanted
        .filter_map(|wanted| panels.iter().find(|panel| panel.0 == wanted).cloned())
        .collect()
}

fn panel(area: &Area, title: &str, all: &[&Series]) -> Drawn {
    let points = || all.iter().flat_map(|series| &series.points);
    let steps = around(points().map(|point| point.0), 0.0);
    let values = around(points().map(|point| point.1), 0.05);
    let digits = digits(&values);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(36)
        .x_label_area_size(42)
        .y_label_area_size(70)
        .build_cartesian_2d(steps, values)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(RGBColor(120, 120, 120))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_desc("step")
        .x_labels(10)
        .y_labels(7)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.digits$}"))
        .draw()?;
    for (number, series) in all.iter().enumerate() {
        let color = COLORS[number % COLORS.len()];
        let points = thinned(&series.points);
        if points.len() > SMOOTH_ABOVE {
            let pale = color.mix(0.25).stroke_width(1);
            chart.draw_series(LineSeries::new(points.iter().copied(), pale))?;
        }
        let line = color.stroke_width(2);
        let drawn = chart.draw_series(LineSeries::new(smoothed(&points), line))?;
        drawn
            .label(&series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3)));
        if points.len() <= DOTS_UP_TO {
            let dot = |&point| Circle::new(point, 3, color.filled());
            chart.draw_series(points.iter().map(dot))?;
        }
    }
    if all.len() > 1 || all[0].name != title {
        chart
            .configure_series_labels()
            .position(legend_place(all))
            .margin(8)
            .legend_area_size(30)
            .label_font(("sans-serif", 14).into_font().color(&BLACK))
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
    }
    let last = all
        .iter()
        .filter_map(|series| Some((&series.name, series.points.last()?.1)));
    let last: Vec<(&str, f64)> = last.map(|(name, value)| (name.as_str(), value)).collect();
    let style = ("sans-serif", 13)
        .into_font()
        .color(&RGBColor(100, 100, 100));
    let style = style.pos(Pos::new(HPos::Right, VPos::Top));
    let corner = (WIDTH as i32 - 36, 14);
    area.draw(&Text::new(
        format!("last: {}", super::line(&last)),
        corner,
        style,
    ))
}

/// Where the curves are not, as far as their ends tell: at the top for falling ones, at the bottom for rising ones.
fn legend_place(all: &[&Series]) -> SeriesLabelPosition {
    let ends = all.iter().filter_map(|series| {
        let (first, last) = (series.points.first()?, series.points.last()?);
        Some(last.1 - first.1)
    });
    match ends.sum::<f64>() > 0.0 {
        true => SeriesLabelPosition::LowerRight,
        false => SeriesLabelPosition::UpperRight,
    }
}

/// The range of finite values, `margin` wider on either side, and never empty.
fn around(values: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
    let ends = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    // A span that is lost beside the values, or larger than f64, cannot be divided into ticks.
    let (low, high) = (
        ends.0.clamp(-LARGEST, LARGEST),
        ends.1.clamp(-LARGEST, LARGEST),
    );
    let span = high - low;
    let least = 1e-6 * low.abs().max(high.abs()).max(1e-9);
    if span > least {
        return low - margin * span..high + margin * span;
    }
    let middle = low / 2.0 + high / 2.0;
    let half = (0.05 * middle.abs()).max(0.5 * least.max(1e-3));
    middle - half..middle + half
}

/// Digits after the point that tell ticks apart.
fn digits(range: &Range<f64>) -> usize {
    let tick = (range.end - range.start) / 7.0;
    // At most about 300.
    (-tick.log10().floor()).clamp(0.0, 12.0) as usize
}

/// At most [`MOST_POINTS`] points: means of neighbours, within what can be drawn.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let merge = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let sum = points.iter().fold((0.0, 0.0), |sum, point| {
            (sum.0 + point.0 / count, sum.1 + point.1 / count)
        });
        (sum.0, sum.1.clamp(-LARGEST, LARGEST))
    };
    points.chunks(merge).map(mean).collect()
}

/// Means over about a fiftieth of a long series, as far to the left of a point as to the right, so that nothing is late; a short series
/// as it is.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let count = points.len();
    if count <= SMOOTH_ABOVE {
        return points.to_vec();
    }
    let smooth = points.iter().enumerate().map(|(i, &(step, _))| {
        let reach = (count / 100).min(i).min(count - 1 - i);
        let near = &points[i - reach..=i + reach];
        let mean = near.iter().map(|point| point.1 / near.len() as f64).sum();
        (step, mean)
    });
    smooth.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::record::Recorder;

    fn svg(curves: &Curves) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        curves.draw_svg(&path)?;
        Ok(std::fs::read_to_string(path).unwrap())
    }

    #[test]
    fn series_of_one_kind_share_a_picture() {
        let mut curves = Curves::new();
        for step in 0..1000_u32 {
            let loss = 1.0 / (1.0 + f64::from(step));
            curves
                .scalars(u64::from(step), &[("train/loss", loss)])
                .unwrap();
            if step % 100 == 0 {
                let scalars = [("validation/loss", 1.1 * loss), ("validation/cosine", 0.5)];
                curves.scalars(u64::from(step), &scalars).unwrap();
            }
        }
        let all = svg(&curves).unwrap();
        assert!(all.contains("height=\"640\""));
        for word in ["train/loss", "validation/loss", "\ncosine", "\nstep"] {
            assert!(all.contains(word), "{word}");
        }
        let one = svg(&curves.panels(["cosine", "unknown"])).unwrap();
        assert!(one.contains("height=\"320\"") && !one.contains("loss"));
    }

    #[test]
    fn awkward_values_are_drawn_and_nothing_is_an_error() {
        for values in [
            &[1.0][..],
            &[0.0, 0.0],
            &[5.0, 5.0, 5.0],
            &[1e-30, 2e-30],
            &[f64::MAX, f64::MIN],
            &[1e15, 1e15 + 1.0],
            &[f64::NAN, 1.0, f64::INFINITY],
        ] {
            let mut curves = Curves::new();
            for (step, value) in values.iter().enumerate() {
                curves.scalars(step as u64, &[("x", *value)]).unwrap();
            }
            assert!(svg(&curves).unwrap().ends_with("</svg>\n"), "{values:?}");
        }
        let mut curves = Curves::new();
        curves.scalars(0, &[("x", f64::NAN)]).unwrap();
        assert!(matches!(svg(&curves), Err(Error::Data { .. })));
    }
}
