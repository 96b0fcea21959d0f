//! What a check found.

use super::Outcome;

/// How many problems are named; of more the rest is counted.
const NAMED: usize = 8;

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it is.
    pub outcome: Outcome,
    /// What was seen.
    pub evidence: String,
    /// What to do, a command or a sentence on each line; empty when there is nothing to do.
    pub fix: String,
}

impl Finding {
    /// All is well.
    pub fn fine(evidence: impl Into<String>) -> Self {
        Self { outcome: Outcome::Fine, evidence: evidence.into(), fix: String::new() }
    }

    /// It may hurt.
    pub fn warning(evidence: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { outcome: Outcome::Warning, evidence: evidence.into(), fix: fix.into() }
    }

    /// It hurts.
    pub fn failed(evidence: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { outcome: Outcome::Failed, evidence: evidence.into(), fix: fix.into() }
    }

    /// There is nothing to look at.
    pub fn skipped(why: impl Into<String>) -> Self {
        Self { outcome: Outcome::Skipped, evidence: why.into(), fix: String::new() }
    }

    /// All problems with their fixes, those that hurt first; `fine` when there are none.
    pub fn of(mut problems: Vec<Problem>, fine: impl Into<String>) -> Self {
        problems.sort_by_key(|problem| !problem.hurts);
        let Some(worst) = problems.first() else { return Self::fine(fine) };
        let outcome = if worst.hurts { Outcome::Failed } else { Outcome::Warning };
        let mut fixes: Vec<&str> = vec![];
        for line in problems.iter().flat_map(|problem| problem.fix.lines()) {
            if !fixes.contains(&line) {
                fixes.push(line);
            }
        }
        let fix = fixes.join("\n");
        Self { outcome, evidence: all(problems.into_iter().map(|problem| problem.what)), fix }
    }
}

/// One of several things that are wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether it hurts now, or only may.
    pub hurts: bool,
    /// What was seen.
    pub what: String,
    /// What to do, a command or a sentence on each line.
    pub fix: String,
}

impl Problem {
    /// One that hurts.
    pub fn failure(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { hurts: true, what: what.into(), fix: fix.into() }
    }

    /// One that may hurt.
    pub fn warning(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { hurts: false, what: what.into(), fix: fix.into() }
    }
}

/// All of several, with their number: `3: this; that; and another`.
pub fn all(words: impl IntoIterator<Item = String>) -> String {
    let words: Vec<String> = words.into_iter().collect();
    match words.len() {
        0 | 1 => words.concat(),
        count if count <= NAMED => format!("{count}: {}", words.join("; ")),
        count => format!("{count}: {}; and {} more", words[..NAMED].join("; "), count - NAMED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_culprits_are_named_the_worst_first_and_each_fix_once() {
        let found = Finding::of(
            vec![
                Problem::warning("a", "do this"),
                Problem::failure("b", "do that\ndo this"),
                Problem::failure("c", "do that"),
            ],
            "none",
        );
        assert_eq!(found, Finding::failed("3: b; c; a", "do that\ndo this"));
        assert_eq!(Finding::of(vec![Problem::warning("a", "do this")], "none"), Finding::warning("a", "do this"));
        assert_eq!(Finding::of(vec![], "none"), Finding::fine("none"));
        assert_eq!(all((0..10).map(|n| n.to_string())), "10: 0; 1; 2; 3; 4; 5; 6; 7; and 2 more");
    }
}
