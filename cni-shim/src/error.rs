//! What the runtime is told when a request fails: CNI spec section 2, "Error".
//!
//! Every failure ends as one object on stdout, `{"cniVersion", "code", "msg", "details"}`, and exit code 1.
//! Nothing in the shim decides by the kind of an error, so one type with a number serves all of it.

use std::fmt::Display;

use serde_json::{Value, json};

use crate::version::SpecVersion;

/// The spec's well-known error codes, and ours from 100 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The requested version isn't spoken, or hasn't got this verb.
    IncompatibleVersion,
    /// A key in the network configuration that can't be honoured.
    UnsupportedField,
    /// An environment variable is missing or malformed.
    InvalidEnvironment,
    /// Reading or writing failed.
    Io,
    /// Content that isn't what it should be.
    Decode,
    /// The network configuration can't work.
    InvalidConfig,
    /// Nothing was done; the same request may succeed in a moment.
    TryAgainLater,
    /// To STATUS: no pod can be added now.
    NotAvailable,
    /// The delegate is not on `CNI_PATH`, or can't be started.
    DelegateMissing,
    /// The delegate did not answer in time and was killed.
    DelegateTimedOut,
    /// The delegate died, or answered what the spec doesn't allow.
    DelegateFailed,
    /// ADD for what is attached already.
    AlreadyAttached,
    /// CHECK for what was never attached, or whose state is lost.
    NotAttached,
    /// The kernel refused what was asked of it.
    Kernel,
    /// The delegate's own code, passed on.
    Relayed(u32),
}

impl Code {
    /// The number as the spec assigns it.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::DelegateMissing => 100,
            Self::DelegateTimedOut => 101,
            Self::DelegateFailed => 102,
            Self::AlreadyAttached => 103,
            Self::NotAttached => 104,
            Self::Kernel => 105,
            Self::Relayed(code) => code,
        }
    }
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct CniError {
    code: Code,
    msg: Box<str>,
    details: Vec<String>,
    version: Option<SpecVersion>,
}

impl CniError {
    /// An error that says in `msg` what failed, where, and the way out.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into().into_boxed_str(), details: Vec::new(), version: None }
    }

    /// The same with something to know besides.
    #[must_use]
    pub fn with_details(mut self, details: impl Display) -> Self {
        self.details.push(details.to_string());
        self
    }

    /// The same, and who said it of what.
    #[must_use]
    pub fn said_by(mut self, speaker: impl Display) -> Self {
        self.msg = format!("{speaker}: {}", self.msg).into();
        self
    }

    /// The same, to be told in this version: a request that can't be taken may still say in which one it asks.
    #[must_use]
    pub fn told_in(mut self, version: Option<SpecVersion>) -> Self {
        self.version = version;
        self
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// The object that goes to stdout, in `version` unless the error knows better.
    #[must_use]
    pub fn to_json(&self, version: SpecVersion) -> Value {
        let version = self.version.unwrap_or(version);
        let mut object = json!({ "cniVersion": version.as_str(), "code": self.code.number(), "msg": self.msg });
        if !self.details.is_empty() {
            object["details"] = self.details.join("; ").into();
        }
        object
    }
}
