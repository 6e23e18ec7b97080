//! Saved state: sections with numbered fields, the container file that holds them, and the
//! inspect tree that a component shows of itself.
//!
//! A *unit* (a device, a vCPU) saves one [`Section`]. Its body is CBOR with numbered fields
//! (`#[derive(minicbor::Encode, minicbor::Decode)] #[cbor(map)]`, `#[n(3)]`), so an old reader
//! skips fields it does not know and fills in missing optional ones. Because skipping is silent, a
//! writer that adds something an old reader must not ignore raises `min_reader`.
#![forbid(unsafe_code)]

use minicbor::{Decode, Encode};

pub mod container;

/// Why state could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section is of another kind of unit.
    #[error("section of unit {unit} is a {found}, expected a {expected}")]
    WrongKind {
        /// Unit name.
        unit: String,
        /// Kind in the section.
        found: String,
        /// Kind that the reader wants.
        expected: &'static str,
    },
    /// Written by a newer program that says this one must not read it.
    #[error("section of unit {unit} needs reader version {min_reader}, this program has {ours}")]
    TooNew {
        /// Unit name.
        unit: String,
        /// Oldest reader version that may read it.
        min_reader: u16,
        /// This program's version of the kind.
        ours: u16,
    },
    /// The body does not decode.
    #[error("section of unit {unit} is damaged: {detail}")]
    Damaged {
        /// Unit name.
        unit: String,
        /// The decoder's words.
        detail: String,
    },
    /// A field holds a value that the unit cannot have.
    #[error("saved state of unit {unit} is invalid: {detail}")]
    Invalid {
        /// Unit name.
        unit: String,
        /// What is wrong.
        detail: String,
    },
    /// The unit cannot be saved now, and why.
    #[error("unit {unit} cannot be saved: {reason}")]
    Unsupported {
        /// Unit name.
        unit: String,
        /// Why.
        reason: String,
    },
}

/// The saved state of one unit.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Section {
    /// Name of the unit within the machine, e.g. `uart0`.
    #[n(0)]
    pub unit: String,
    /// Kind of unit, e.g. `uart-16550`.
    #[n(1)]
    pub kind: String,
    /// Version of the kind's saved form.
    #[n(2)]
    pub version: u16,
    /// Oldest version of a reader that may read it.
    #[n(3)]
    pub min_reader: u16,
    /// CBOR body.
    #[cbor(n(4), with = "minicbor::bytes")]
    pub body: Vec<u8>,
}

impl Section {
    /// Encodes `body` as version `version` of `kind`, readable by readers from version 1.
    pub fn new<T: Encode<()>>(unit: &str, kind: &'static str, version: u16, body: &T) -> Section {
        // Encoding into a Vec cannot fail.
        let body = minicbor::to_vec(body).unwrap_or_default();
        Section {
            unit: unit.to_owned(),
            kind: kind.to_owned(),
            version,
            min_reader: 1,
            body,
        }
    }

    /// Decodes the body of a section of `kind`, of which this program writes version `ours`.
    pub fn decode<'a, T: Decode<'a, ()>>(
        &'a self,
        kind: &'static str,
        ours: u16,
    ) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::WrongKind {
                unit: self.unit.clone(),
                found: self.kind.clone(),
                expected: kind,
            });
        }
        if self.min_reader > ours {
            return Err(StateError::TooNew {
                unit: self.unit.clone(),
                min_reader: self.min_reader,
                ours,
            });
        }
        minicbor::decode(&self.body).map_err(|e| StateError::Damaged {
            unit: self.unit.clone(),
            detail: e.to_string(),
        })
    }
}

/// What a component shows of itself, live: a tree of named values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inspect {
    /// Named children, in order.
    Node(Vec<(String, Inspect)>),
    /// A count or size.
    Uint(u64),
    /// An address or register, shown in hexadecimal.
    Hex(u64),
    /// A yes or no.
    Bool(bool),
    /// Text.
    Text(String),
}

impl Inspect {
    /// A node from literal names.
    pub fn node<const N: usize>(children: [(&str, Inspect); N]) -> Inspect {
        Inspect::Node(
            children
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect(),
        )
    }

    /// The subtree at a `/`-separated path; the empty path is the tree itself.
    pub fn at(&self, path: &str) -> Option<&Inspect> {
        path.split('/')
            .filter(|p| !p.is_empty())
            .try_fold(self, |t, name| match t {
                Inspect::Node(c) => c.iter().find(|(k, _)| k == name).map(|(_, v)| v),
                _ => None,
            })
    }
}
