//! What a check found.

use super::Outcome;

/// How many culprits are named; of more the rest is counted.
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

    /// All culprits with their fixes, those that hurt first; `fine` when there are none.
    pub fn of(mut culprits: Vec<Culprit>, fine: impl Into<String>) -> Self {
        culprits.sort_by_key(|culprit| !culprit.hurts);
        let Some(worst) = culprits.first() else { return Self::fine(fine) };
        let outcome = if worst.hurts { Outcome::Failed } else { Outcome::Warning };
        let mut fixes: Vec<&str> = vec![];
        for line in culprits.iter().flat_map(|culprit| culprit.fix.lines()) {
            if !fixes.contains(&line) {
                fixes.push(line);
            }
        }
        let fix = fixes.join("\n");
        Self { outcome, evidence: all(culprits.into_iter().map(|culprit| culprit.what)), fix }
    }
}

/// One of several things that are wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// Whether it hurts now, or only may.
    pub hurts: bool,
    /// What was seen.
    pub what: String,
    /// What to do, a command or a sentence on each line.
    pub fix: String,
}

impl Culprit {
    /// One that hurts.
    pub fn hurts(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { hurts: true, what: what.into(), fix: fix.into() }
    }

    /// One that may hurt.
    pub fn may_hurt(what: impl Into<String>, fix: impl Into<String>) -> Self {
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
                Culprit::may_hurt("a", "do this"),
                Culprit::hurts("b", "do that\ndo this"),
                Culprit::hurts("c", "do that"),
            ],
            "none",
        );
        assert_eq!(found, Finding::failed("3: b; c; a", "do that\ndo this"));
        assert_eq!(Finding::of(vec![Culprit::may_hurt("a", "do this")], "none"), Finding::warning("a", "do this"));
        assert_eq!(Finding::of(vec![], "none"), Finding::fine("none"));
        assert_eq!(all((0..10).map(|n| n.to_string())), "10: 0; 1; 2; 3; 4; 5; 6; 7; and 2 more");
    }
}
