//! Columns that line up.

/// `rows` as lines, each column as wide as its widest cell, two spaces between.
pub fn render<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let body = rows.iter().map(|row| line(std::array::from_fn(|i| row[i].as_str())));
    std::iter::once(line(header)).chain(body).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let rows = [["node-1", "10.244.1.0/24", ""], ["n2", "-", "x"]].map(|row| row.map(str::to_owned));
        let want = "NODE    SUBNET         WHY\nnode-1  10.244.1.0/24\nn2      -              x\n";
        assert_eq!(super::render(["NODE", "SUBNET", "WHY"], &rows), want);
    }
}
