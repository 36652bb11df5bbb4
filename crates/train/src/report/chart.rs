//! Curves as inline SVG. Size is bounded: a curve of any length is drawn with at most [`MAX_POINTS`] points.

use plotters::prelude::*;

use super::format::{escape, tick};

/// Points of a curve after thinning.
pub(super) const MAX_POINTS: usize = 1000;
/// A range whose ends differ by more than this factor is drawn on a logarithmic axis, where all of it can be seen.
const LOG_FROM_RATIO: f64 = 40.0;
/// Curves with at least so many points also get a smoothed curve.
const SMOOTH_FROM: usize = 40;
/// The drawing is made larger by this factor and shrunk by its view box, since the library places whole pixels only.
const FINENESS: u32 = 4;
const WIDTH: u32 = 560;
const HEIGHT: u32 = 300;

/// Colours of the light theme. The style sheet finds them by these values and replaces them in the dark theme.
const TEXT: RGBColor = RGBColor(0x59, 0x63, 0x6E);
const GRID: RGBColor = RGBColor(0xE2, 0xE6, 0xEB);
const AXIS: RGBColor = RGBColor(0xA9, 0xB1, 0xBB);

/// Which of the two colours a curve has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    First,
    Second,
}

impl Colour {
    fn rgb(self) -> RGBColor {
        match self {
            Self::First => RGBColor(0x25, 0x63, 0xEB),
            Self::Second => RGBColor(0xD9, 0x5F, 0x02),
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Second => "second",
        }
    }
}

/// One curve: points in the order of x.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) colour: Colour,
    /// Noisy curves are drawn pale under their smoothed form.
    pub(super) noisy: bool,
    pub(super) points: Vec<(f64, f64)>,
}

/// A figure with one or more curves over the same axes.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: &'static str,
    pub(super) y_label: &'static str,
    /// Zero belongs to the axis (a learning rate, a speed).
    pub(super) from_zero: bool,
    pub(super) curves: Vec<Curve>,
}

impl Chart {
    /// The figure as HTML; `None` when there is no point to draw (points that are not finite are left out).
    pub(super) fn render(&self) -> Option<String> {
        let curves: Vec<Curve> = self
            .curves
            .iter()
            .map(|curve| Curve {
                points: curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect(),
                ..curve.clone()
            })
            .filter(|curve| !curve.points.is_empty())
            .collect();
        let axes = Axes::of(&curves, self.from_zero)?;
        let mut svg = String::new();
        // Drawing into a string cannot fail; were it to, the report is better without the figure than not at all.
        self.draw(&curves, &axes, &mut svg).ok()?;
        let label = escape(self.title);
        let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{label}\" "), 1);
        let mut legend = String::new();
        // One plain curve is named by the title.
        for curve in curves.iter().filter(|curve| self.curves.len() > 1 || smooths(curve)) {
            let smoothed = if smooths(curve) { ", smoothed" } else { "" };
            legend.push_str(&format!(
                "<span class=\"key {}\">{}{smoothed}</span>",
                curve.colour.class(),
                escape(curve.name)
            ));
        }
        Some(format!(
            "<figure class=\"chart\"><figcaption><h3>{label}</h3><span>{legend}</span></figcaption>{svg}</figure>"
        ))
    }

    fn draw(&self, curves: &[Curve], axes: &Axes, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let px = |pixels: u32| pixels * FINENESS;
        let root = SVGBackend::with_string(svg, (px(WIDTH), px(HEIGHT))).into_drawing_area();
        let text = |size: u32| ("sans-serif", px(size)).into_font().color(&TEXT);
        let mut chart = ChartBuilder::on(&root)
            .margin(px(6))
            .margin_right(px(24))
            .x_label_area_size(px(42))
            .y_label_area_size(px(80))
            .build_cartesian_2d(axes.x.0..axes.x.1, axes.y.0..axes.y.1)?;
        let y_label = if axes.log { format!("{} (log scale)", self.y_label) } else { self.y_label.to_owned() };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .set_all_tick_mark_size(px(4))
            .bold_line_style(GRID.stroke_width(px(1)))
            .light_line_style(TRANSPARENT)
            .axis_style(AXIS.stroke_width(px(1)))
            .label_style(text(15))
            .axis_desc_style(text(16))
            .x_desc("step")
            .y_desc(y_label)
            .x_labels(7)
            .y_labels(axes.y_labels())
            .x_label_formatter(&|x| if x.fract().abs() < 1e-9 { tick(*x) } else { String::new() })
            .y_label_formatter(&|y| if axes.log { tick(10f64.powf(*y)) } else { tick(*y) })
            .draw()?;
        for curve in curves {
            let colour = curve.colour.rgb();
            let line = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
                thin(points, MAX_POINTS).into_iter().map(|(x, y)| (x, axes.place(y))).collect()
            };
            let drawn = line(&curve.points);
            if smooths(curve) {
                chart.draw_series(LineSeries::new(drawn, colour.mix(0.28).stroke_width(px(1))))?;
                chart.draw_series(LineSeries::new(line(&smoothed(&curve.points)), colour.stroke_width(px(2))))?;
                continue;
            }
            if curve.points.len() <= SMOOTH_FROM {
                let dots = drawn.iter().map(|&point| Circle::new(point, px(3), colour.filled()));
                chart.draw_series(dots)?;
            }
            chart.draw_series(LineSeries::new(drawn, colour.stroke_width(px(2))))?;
        }
        root.present()?;
        Ok(())
    }
}

fn smooths(curve: &Curve) -> bool {
    curve.noisy && curve.points.len() >= SMOOTH_FROM
}

/// What the axes span; y in units of the drawing, so its decimal logarithm on a logarithmic axis.
#[derive(Debug, PartialEq)]
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
    log: bool,
}

impl Axes {
    fn of(curves: &[Curve], from_zero: bool) -> Option<Self> {
        let points = || curves.iter().flat_map(|curve| &curve.points);
        points().next()?;
        let span = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let mut x = span(&mut points().map(|point| point.0));
        if x.0 == x.1 {
            x = (x.0 - 1.0, x.1 + 1.0);
        } else if x.0 > 0.0 && x.0 <= 0.05 * x.1 {
            // A curve that starts at the first record shows its origin.
            x.0 = 0.0;
        }
        let (low, high) = span(&mut points().map(|point| point.1));
        let log = !from_zero && low > 0.0 && high / low > LOG_FROM_RATIO;
        let y = if log {
            // Whole decades, so that the ticks are round.
            (low.log10().floor(), high.log10().ceil())
        } else {
            let low = if from_zero { low.min(0.0) } else { low };
            let room = match high - low {
                0.0 if high == 0.0 => 1.0,
                0.0 => 0.1 * high.abs(),
                height => 0.06 * height,
            };
            (if from_zero && low == 0.0 { 0.0 } else { low - room }, high + room)
        };
        // Differences beyond the range of f64 leave nothing to draw on.
        ((x.1 - x.0).is_finite() && (y.1 - y.0).is_finite()).then_some(Self { x, y, log })
    }

    fn place(&self, y: f64) -> f64 {
        if self.log { y.log10() } else { y }
    }

    fn y_labels(&self) -> usize {
        // One a decade; the library takes the next coarser step by itself when that is too many.
        if self.log { ((self.y.1 - self.y.0) as usize + 1).min(8) } else { 6 }
    }
}

/// At most `max_points` of the points: of each bucket of neighbours its lowest and its highest, so that every spike
/// stays, and both ends of the curve.
fn thin(points: &[(f64, f64)], max_points: usize) -> Vec<(f64, f64)> {
    let [first, inner @ .., last] = points else { return points.to_vec() };
    if points.len() <= max_points {
        return points.to_vec();
    }
    let num_buckets = (max_points.saturating_sub(2) / 2).max(1);
    let mut thinned = vec![*first];
    for bucket in inner.chunks(inner.len().div_ceil(num_buckets)) {
        let by_height = |a: &usize, b: &usize| bucket[*a].1.total_cmp(&bucket[*b].1);
        let low = (0..bucket.len()).min_by(by_height);
        let high = (0..bucket.len()).max_by(by_height);
        let (Some(low), Some(high)) = (low, high) else { continue };
        thinned.push(bucket[low.min(high)]);
        if low != high {
            thinned.push(bucket[low.max(high)]);
        }
    }
    thinned.push(*last);
    thinned
}

/// An exponential moving average over about a thirtieth of the curve, corrected for its start (as in Adam).
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 30.0).max(4.0);
    let (mut average, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            average = keep * average + (1.0 - keep) * y;
            weight = keep * weight + (1.0 - keep);
            (x, average / weight)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chart(points: Vec<(f64, f64)>, noisy: bool) -> Chart {
        let curve = Curve { name: "training", colour: Colour::First, noisy, points };
        let none = Curve { points: vec![], ..curve.clone() };
        Chart { title: "Loss", y_label: "nats per token", from_zero: false, curves: vec![curve, none] }
    }

    #[test]
    fn a_chart_has_title_axes_legend_and_curve() {
        let html = chart((0..10).map(|i| (f64::from(i), 3.0 - 0.1 * f64::from(i))).collect(), true).render().unwrap();
        for part in ["<h3>Loss</h3>", ">training<", "role=\"img\"", "nats per token", "step", "<polyline", "<circle"] {
            assert!(html.contains(part), "{part} is missing in {html}");
        }
        assert!(!html.contains("smoothed") && !html.contains("log scale"));
        let mut alone = chart(vec![(1.0, 2.0), (2.0, 1.0)], false);
        alone.curves.truncate(1);
        assert!(!alone.render().unwrap().contains("class=\"key"));
    }

    #[test]
    fn points_that_are_no_numbers_are_left_out() {
        assert!(chart(vec![], true).render().is_none());
        assert!(chart(vec![(1.0, f64::NAN), (2.0, f64::INFINITY)], true).render().is_none());
        let html = chart(vec![(1.0, 2.0), (2.0, f64::NAN), (3.0, 2.5)], true).render().unwrap();
        assert!(!html.contains("NaN"));
        assert_eq!(html.matches("<circle").count(), 2);
        // One point, and a flat curve at zero.
        assert!(chart(vec![(7.0, 2.0)], true).render().unwrap().contains("<circle"));
        assert!(chart(vec![(1.0, 0.0), (2.0, 0.0)], false).render().is_some());
        assert!(chart(vec![(1.0, -f64::MAX), (2.0, f64::MAX)], false).render().is_none());
    }

    #[test]
    fn long_curves_stay_small() {
        let points = (0..100_000).map(|i| (f64::from(i), 2.0 + (f64::from(i) * 0.37).sin())).collect();
        let html = chart(points, true).render().unwrap();
        assert!(html.len() < 60_000, "{} bytes", html.len());
        assert!(html.contains("training, smoothed"));
    }

    #[test]
    fn wide_ranges_are_logarithmic_over_whole_decades() {
        let wide = chart(vec![(1.0, 0.3), (2.0, 250.0)], false);
        assert_eq!(Axes::of(&wide.curves, false), Some(Axes { x: (1.0, 2.0), y: (-1.0, 3.0), log: true }));
        assert!(wide.render().unwrap().contains("log scale"));
        let rates = Axes::of(&chart(vec![(1.0, 0.0), (2.0, 1.0)], false).curves, true).unwrap();
        assert_eq!((rates.y, rates.log), ((0.0, 1.06), false));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_starts_at_the_start() {
        let flat: Vec<_> = (0..50).map(|i| (f64::from(i), 2.5)).collect();
        assert!(smoothed(&flat).iter().all(|point| (point.1 - 2.5).abs() < 1e-12));
    }

    proptest! {
        #[test]
        fn thinning_keeps_order_ends_and_extremes(heights in prop::collection::vec(-1e3f64..1e3, 0..3000), max in 4usize..200) {
            let points: Vec<_> = heights.iter().enumerate().map(|(i, &y)| (i as f64, y)).collect();
            let thinned = thin(&points, max);
            prop_assert!(thinned.len() <= max.max(points.len().min(max)));
            prop_assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert_eq!(thinned.first(), points.first());
            prop_assert_eq!(thinned.last(), points.last());
            let highest = |points: &[(f64, f64)]| points.iter().map(|point| point.1).fold(f64::MIN, f64::max);
            prop_assert_eq!(highest(&thinned), highest(&points));
        }
    }
}
