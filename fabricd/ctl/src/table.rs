//! Columns that line up.

use crate::output::{Screen, Severity};

/// One cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    severity: Severity,
}

impl Cell {
    /// A cell that means something.
    pub fn coloured(text: impl Into<String>, severity: Severity) -> Self {
        Self { text: text.into(), severity }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::coloured(text, Severity::Plain)
    }
}

/// `rows` as lines, each column as wide as its widest cell, two spaces between. What is too wide for the screen is cut,
/// and ends in `…`. A column that has a name and no text in any row is left out.
pub fn render<const N: usize>(screen: &Screen, header: [&str; N], rows: &[[Cell; N]]) -> String {
    let mut header = header;
    for (column, name) in header.iter_mut().enumerate().filter(|_| !rows.is_empty()) {
        if rows.iter().all(|row| row[column].text.is_empty()) {
            *name = "";
        }
    }
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.text.chars().count());
        }
    }
    let head = header.map(Cell::from);
    let lines = std::iter::once(&head).chain(rows);
    lines.map(|row| line(screen, widths, row) + "\n").collect()
}

fn line<const N: usize>(screen: &Screen, widths: [usize; N], row: &[Cell; N]) -> String {
    let mut room = screen.width.unwrap_or(usize::MAX);
    let mut line = String::new();
    let last = row.iter().rposition(|cell| !cell.text.is_empty());
    for (position, (cell, width)) in row.iter().zip(widths).enumerate().take(last.map_or(0, |last| last + 1)) {
        if width == 0 {
            continue;
        }
        let text = cut(&cell.text, room);
        let padding = if Some(position) == last { 0 } else { width + 2 - cell.text.chars().count() };
        line += &screen.paint(&text, cell.severity);
        room = room.saturating_sub(text.chars().count());
        line += &" ".repeat(padding.min(room));
        room = room.saturating_sub(padding);
        if room == 0 {
            break;
        }
    }
    line
}

/// `text`, or as much of it as fits.
pub fn cut(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

/// A number of seconds in a few letters.
pub fn span(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(screen: &Screen) -> String {
        let rows = [["node-1", "10.244.1.0/24", ""], ["n2", "-", "a long story"]];
        render(screen, ["NODE", "SUBNET", "WHY"], &rows.map(|row| row.map(Cell::from)))
    }

    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let want = "NODE    SUBNET         WHY\nnode-1  10.244.1.0/24\nn2      -              a long story\n";
        assert_eq!(table(&Screen::default()), want);
    }

    #[test]
    fn column_without_any_text_is_left_out() {
        let rows = [["node-1", "", "7"], ["n2", "", "8"]];
        let told = render(&Screen::default(), ["NODE", "SUBNET", "EPOCH"], &rows.map(|row| row.map(Cell::from)));
        assert_eq!(told, "NODE    EPOCH\nnode-1  7\nn2      8\n");
        assert_eq!(render(&Screen::default(), ["NODE", "SUBNET"], &[]), "NODE  SUBNET\n");
    }

    #[test]
    fn what_is_too_wide_for_the_terminal_is_cut() {
        for width in 1..40 {
            let told = table(&Screen { width: Some(width), colour: false });
            assert!(told.lines().all(|line| line.chars().count() <= width), "{width}:\n{told}");
        }
        assert!(table(&Screen { width: Some(27), colour: false }).ends_with("n2      -              a l…\n"));
    }

    #[test]
    fn colours_cost_no_width_and_are_for_terminals_only() {
        let rows = [[Cell::coloured("ready", Severity::Good), "x".into()]];
        let screen = Screen { width: Some(8), colour: true };
        assert_eq!(render(&screen, ["A", "B"], &rows), "A      B\n\u{1b}[32mready\u{1b}[0m  x\n");
        assert_eq!(render(&Screen::default(), ["A", "B"], &rows), "A      B\nready  x\n");
    }
}
