//! [`Object`]: what `clang -target bpf` makes, an ELF file of 64 bits in little endian (System V ABI, `elf.h`; for the
//! relocations `Documentation/bpf/llvm_reloc.rst`).
//!
//! Each section of code is one program, named by the function that it begins with. Calls between functions are not known:
//! all of them must be inlined. Neither are variables: what a program has to know is in a map.

/// `R_BPF_64_64`: the address of something in a `ld_imm64`.
const R_BPF_64_64: u64 = 1;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_REL: u32 = 9;
const SHF_EXECINSTR: u64 = 4;
const STT_FUNC: u8 = 2;
/// `BPF_LD | BPF_IMM | BPF_DW`.
const LD_IMM64: u8 = 0x18;

/// Why an object file can't be used. It is of our own build, so each is a fault of that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Not such a file, or cut off.
    #[error("not an object file of clang -target bpf: {0}")]
    Malformed(&'static str),
    /// A program uses what only a linker could give it.
    #[error("{program} refers to {symbol}, which is no map: functions must be inlined, and variables be in maps")]
    Unsupported {
        /// Which program.
        program: String,
        /// What it refers to.
        symbol: String,
    },
}

/// The programs of an object file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Each with the maps that it uses.
    pub programs: Vec<Code>,
}

/// A program that was not loaded yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its function.
    pub name: String,
    /// Eight bytes each.
    pub instructions: Vec<u8>,
    /// Where a map is to be put.
    pub maps: Vec<MapUse>,
}

/// An instruction that needs a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapUse {
    /// Its first byte.
    pub at: usize,
    /// The map's name.
    pub map: String,
}

impl Object {
    /// Reads an object file.
    ///
    /// # Errors
    /// See [`ObjectError`].
    pub fn parse(file: &[u8]) -> Result<Self, ObjectError> {
        let elf = Elf { file };
        if file.get(..6) != Some(b"\x7fELF\x02\x01") || elf.u16(18)? != 247 {
            return Err(ObjectError::Malformed("its header"));
        }
        let sections = elf.sections()?;
        let symbols = elf.symbols(&sections)?;
        let mut programs = vec![];
        for (index, section) in sections.iter().enumerate() {
            if section.kind != SHT_PROGBITS || section.flags & SHF_EXECINSTR == 0 || section.size == 0 {
                continue;
            }
            let begins = |symbol: &&Symbol| symbol.is_function && symbol.section == index && symbol.value == 0;
            let name =
                symbols.iter().find(begins).ok_or(ObjectError::Malformed("code without a function"))?.name.clone();
            let instructions = elf.bytes(section)?.to_vec();
            if instructions.len() % 8 != 0 {
                return Err(ObjectError::Malformed("half an instruction"));
            }
            let mut code = Code { name, instructions, maps: vec![] };
            let relocations = sections.iter().filter(|other| other.kind == SHT_REL && other.info == index);
            for relocation in relocations {
                elf.relocate(relocation, &sections, &symbols, &mut code)?;
            }
            programs.push(code);
        }
        Ok(Self { programs })
    }
}

impl Code {
    /// A number for what it does: of other code it is another. It says nothing of the maps.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let maps = self.maps.iter().flat_map(|used| used.map.bytes());
        let bytes = self.name.bytes().chain(self.instructions.iter().copied()).chain(maps);
        // FNV-1a.
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// What a section header says.
struct Section {
    name: String,
    kind: u32,
    flags: u64,
    offset: u64,
    size: u64,
    link: usize,
    info: usize,
}

struct Symbol {
    name: String,
    is_function: bool,
    section: usize,
    value: u64,
}

struct Elf<'a> {
    file: &'a [u8],
}

impl Elf<'_> {
    fn sections(&self) -> Result<Vec<Section>, ObjectError> {
        let (table, count, names) = (self.u64(40)?, self.u16(60)?, self.u16(62)?);
        let header =
            |index: u16| table.checked_add(u64::from(index) * 64).ok_or(ObjectError::Malformed("its sections"));
        let names = header(names).and_then(|at| self.u64(at.saturating_add(24)))?;
        (0..count)
            .map(|index| {
                let at = header(index)?;
                Ok(Section {
                    name: self.text(names.saturating_add(u64::from(self.u32(at)?)))?,
                    kind: self.u32(at.saturating_add(4))?,
                    flags: self.u64(at.saturating_add(8))?,
                    offset: self.u64(at.saturating_add(24))?,
                    size: self.u64(at.saturating_add(32))?,
                    link: self.u32(at.saturating_add(40))? as usize,
                    info: self.u32(at.saturating_add(44))? as usize,
                })
            })
            .collect()
    }

    fn symbols(&self, sections: &[Section]) -> Result<Vec<Symbol>, ObjectError> {
        let Some(table) = sections.iter().find(|section| section.kind == SHT_SYMTAB) else { return Ok(vec![]) };
        let names = sections.get(table.link).ok_or(ObjectError::Malformed("its symbols"))?.offset;
        self.bytes(table)?
            .chunks_exact(24)
            .map(|symbol| {
                let symbol = Elf { file: symbol };
                Ok(Symbol {
                    name: self.text(names.saturating_add(u64::from(symbol.u32(0)?)))?,
                    is_function: symbol.file[4] & 0xf == STT_FUNC,
                    section: usize::from(symbol.u16(6)?),
                    value: symbol.u64(8)?,
                })
            })
            .collect()
    }

    fn relocate(
        &self,
        section: &Section,
        sections: &[Section],
        symbols: &[Symbol],
        code: &mut Code,
    ) -> Result<(), ObjectError> {
        for entry in self.bytes(section)?.chunks_exact(16) {
            let entry = Elf { file: entry };
            let (at, info) = (entry.u64(0)?, entry.u64(8)?);
            let symbol = usize::try_from(info >> 32).ok().and_then(|index| symbols.get(index));
            let symbol = symbol.ok_or(ObjectError::Malformed("a relocation without a symbol"))?;
            let is_map = sections.get(symbol.section).is_some_and(|section| section.name == ".maps");
            let at = usize::try_from(at).ok().filter(|at| code.instructions.get(*at) == Some(&LD_IMM64));
            match at.filter(|at| at % 8 == 0 && at + 16 <= code.instructions.len()) {
                Some(at) if is_map && info & 0xffff_ffff == R_BPF_64_64 => {
                    code.maps.push(MapUse { at, map: symbol.name.clone() });
                }
                _ => {
                    let symbol = if symbol.name.is_empty() { "a variable or function" } else { &symbol.name };
                    return Err(ObjectError::Unsupported { program: code.name.clone(), symbol: symbol.to_owned() });
                }
            }
        }
        Ok(())
    }

    fn bytes(&self, section: &Section) -> Result<&[u8], ObjectError> {
        let begin = usize::try_from(section.offset).unwrap_or(usize::MAX);
        let length = usize::try_from(section.size).unwrap_or(usize::MAX);
        begin.checked_add(length).and_then(|end| self.file.get(begin..end)).ok_or(ObjectError::Malformed("cut off"))
    }

    fn text(&self, at: u64) -> Result<String, ObjectError> {
        let rest = usize::try_from(at).ok().and_then(|at| self.file.get(at..)).unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == 0).ok_or(ObjectError::Malformed("a name without an end"))?;
        String::from_utf8(rest[..end].to_vec()).map_err(|_| ObjectError::Malformed("a name"))
    }

    fn array<const N: usize>(&self, at: u64) -> Result<[u8; N], ObjectError> {
        let begin = usize::try_from(at).unwrap_or(usize::MAX);
        let bytes = begin.checked_add(N).and_then(|end| self.file.get(begin..end));
        bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(ObjectError::Malformed("cut off"))
    }

    fn u16(&self, at: u64) -> Result<u16, ObjectError> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: u64) -> Result<u32, ObjectError> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: u64) -> Result<u64, ObjectError> {
        self.array(at).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_object_file_is_said_to_be_none() {
        for file in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0x7f; 200]] {
            assert!(Object::parse(file).is_err(), "{file:?}");
        }
    }

    #[test]
    fn another_program_has_another_fingerprint() {
        let code = Code { name: "fabric_a".into(), instructions: vec![0x95; 8], maps: vec![] };
        let other = Code { name: "fabric_b".into(), ..code.clone() };
        let with_map = Code { maps: vec![MapUse { at: 0, map: "peers".into() }], ..code.clone() };
        let longer = Code { instructions: vec![0x95; 16], ..code.clone() };
        assert!([other, with_map, longer].iter().all(|other| other.fingerprint() != code.fingerprint()));
        assert_eq!(code.fingerprint(), code.clone().fingerprint());
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(head in 0..2_usize, body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut file = if head == 0 { vec![] } else { [&b"\x7fELF\x02\x01"[..], &[0; 12], &[247, 0]].concat() };
            file.extend(body);
            let _ = Object::parse(&file);
        }
    }
}
