//! Figures: medians of samples with their spread, ratios between them, as lines, as tables of Markdown and as JSON.

use std::fmt;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// All figures of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What they were measured on.
    pub conditions: Vec<(String, String)>,
    /// The figures in the order in which they were taken.
    pub figures: Vec<Figure>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What it belongs to: a heading of the table.
    pub section: String,
    /// What was measured.
    pub name: String,
    /// `ms`, `MiB`, …; `×` for a ratio.
    pub unit: &'static str,
    /// The middle one of the samples.
    pub median: f64,
    /// The samples in order of size.
    pub samples: Vec<f64>,
}

impl Report {
    /// Takes a figure, and prints it at once: a run takes minutes.
    ///
    /// # Panics
    /// Without a sample.
    pub fn figure(&mut self, section: &str, name: &str, unit: &'static str, samples: Vec<f64>) -> f64 {
        let samples = sorted(samples);
        let figure = Figure {
            section: section.to_owned(),
            name: name.to_owned(),
            unit,
            median: quantile(&samples, 0.5),
            samples,
        };
        if self.figures.last().is_none_or(|last| last.section != figure.section) {
            println!("\n{section}");
        }
        println!("{figure}");
        let median = figure.median;
        self.figures.push(figure);
        median
    }

    /// Takes one number.
    pub fn number(&mut self, section: &str, name: &str, unit: &'static str, value: f64) -> f64 {
        self.figure(section, name, unit, vec![value])
    }

    /// Takes the ratio of two figures.
    pub fn ratio(&mut self, section: &str, name: &str, of: f64, to: f64) -> f64 {
        self.number(section, name, "×", of / to)
    }

    /// Writes everything, as JSON and beside it as tables of Markdown, for docs/performance.md.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn save(&self, json: &Path) -> Result<()> {
        let write =
            |path: &Path, text| std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()));
        write(json, serde_json::to_string_pretty(self)?)?;
        write(&json.with_extension("md"), self.markdown())
    }

    fn markdown(&self) -> String {
        let conditions: Vec<String> = self.conditions.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let mut text = format!("Measured on: {}.\n", conditions.join(", "));
        for section in self.figures.chunk_by(|a, b| a.section == b.section) {
            let _ = write!(text, "\n| {} | median | least to most |\n|---|---|---|\n", section[0].section);
            for figure in section {
                let spread = figure.spread().map(|(least, most)| format!("{} to {}", amount(least), amount(most)));
                let (median, spread) = (amount(figure.median), spread.unwrap_or_default());
                let _ = writeln!(text, "| {} | {median} {} | {spread} |", figure.name, figure.unit);
            }
        }
        text
    }
}

impl Figure {
    /// The least and the most of several samples.
    fn spread(&self) -> Option<(f64, f64)> {
        match &self.samples[..] {
            [least, .., most] => Some((*least, *most)),
            _ => None,
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:<58} {:>10} {}", self.name, amount(self.median), self.unit)?;
        match self.spread() {
            Some((least, most)) => {
                write!(f, "  ({} to {}, {} samples)", amount(least), amount(most), self.samples.len())
            }
            None => Ok(()),
        }
    }
}

/// Three digits that count.
fn amount(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        ..0.1 => format!("{value:.4}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Milliseconds.
#[must_use]
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// In order of size.
#[must_use]
pub fn sorted(mut samples: Vec<f64>) -> Vec<f64> {
    samples.sort_by(f64::total_cmp);
    samples
}

/// The sample below which this share of them lies.
///
/// # Panics
/// Without a sample.
#[must_use]
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index"
    )]
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_percentile_are_samples() {
        let samples = sorted((1..=101).rev().map(f64::from).collect());
        assert_eq!((quantile(&samples, 0.5), quantile(&samples, 0.99)), (51.0, 100.0));
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn each_section_is_a_table() {
        let mut report = Report { conditions: vec![("CPUs".into(), "2".into())], figures: vec![] };
        report.figure("start", "fabricd", "ms", vec![3.0, 1.0, 2.0]);
        report.ratio("rest", "half", 1.0, 2.0);
        assert_eq!(
            report.markdown(),
            "Measured on: CPUs 2.\n\n| start | median | least to most |\n|---|---|---|\n| fabricd | 2.00 ms | 1.00 to \
             3.00 |\n\n| rest | median | least to most |\n|---|---|---|\n| half | 0.50 × |  |\n"
        );
    }
}
