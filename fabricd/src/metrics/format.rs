//! The two formats of `/metrics`: OpenMetrics for those who ask for it, Prometheus' older text format for everybody else.

use std::collections::BTreeSet;

/// How metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The one that an `Accept` header (RFC 9110 section 12.5.1) asks for.
    #[must_use]
    pub fn accepted(header: &str) -> Self {
        let (mut text, mut openmetrics) = (0.0_f32, 0.0_f32);
        for range in header.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0);
            match kind.as_str() {
                "application/openmetrics-text" => openmetrics = openmetrics.max(weight),
                "text/plain" | "text/*" | "*/*" => text = text.max(weight),
                _ => {}
            }
        }
        if openmetrics > 0.0 && openmetrics >= text { Self::OpenMetrics } else { Self::Text }
    }

    /// The `Content-Type` of what is written so.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes in this format what is there in OpenMetrics.
    #[must_use]
    pub fn write(self, openmetrics: String) -> String {
        match self {
            Self::Text => as_text(&openmetrics),
            Self::OpenMetrics => openmetrics,
        }
    }
}

/// In the text format a family has the name of its samples: with `_total` or `_info`. It has no units, no end mark, and
/// no type `info`.
fn as_text(openmetrics: &str) -> String {
    let of_type = |wanted: &str| -> BTreeSet<&str> {
        let types = openmetrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        types.filter(|(_, kind)| *kind == wanted).map(|(name, _)| name).collect()
    };
    let (counters, infos) = (of_type("counter"), of_type("info"));
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines().filter(|line| !line.starts_with("# UNIT") && *line != "# EOF") {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let line = match words[..] {
            ["#", what, name, rest] if counters.contains(name) => format!("# {what} {name}_total {rest}"),
            ["#", "TYPE", name, _] if infos.contains(name) => format!("# TYPE {name}_info gauge"),
            ["#", what, name, rest] if infos.contains(name) => format!("# {what} {name}_info {rest}"),
            _ => line.to_owned(),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_those_who_prefer_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (header, format) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("text/plain", Format::Text),
            ("text/html, */*;q=0.8", Format::Text),
            ("text/plain, application/openmetrics-text;q=0.5", Format::Text),
            ("application/openmetrics-text;q=0, text/plain;q=0", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("Application/OpenMetrics-Text; version=1.0.0 ; q=0.9, text/plain;q=0.3", Format::OpenMetrics),
            (prometheus, Format::OpenMetrics),
        ] {
            assert_eq!(Format::accepted(header), format, "{header}");
        }
    }

    #[test]
    fn text_has_the_names_of_its_samples_and_neither_units_nor_an_end() {
        let openmetrics = "# HELP a_seconds Time.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\n\
                           a_seconds_total{x=\"# TYPE\"} 1\n# HELP b Build.\n# TYPE b info\nb_info{v=\"1\"} 1\n\
                           # HELP c Gauge.\n# TYPE c gauge\nc 2\n# EOF\n";
        let text = "# HELP a_seconds_total Time.\n# TYPE a_seconds_total counter\na_seconds_total{x=\"# TYPE\"} 1\n\
                    # HELP b_info Build.\n# TYPE b_info gauge\nb_info{v=\"1\"} 1\n# HELP c Gauge.\n# TYPE c gauge\nc 2\n";
        assert_eq!(Format::Text.write(openmetrics.to_owned()), text);
        assert_eq!(Format::OpenMetrics.write(openmetrics.to_owned()), openmetrics);
    }
}
