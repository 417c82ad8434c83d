// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Compares the Rust definitions of the protocol with `include/uapi`, by letting the C compiler
//! check what Rust says about every structure, field and number.

mod table;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn uapi() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include/uapi")
}

/// Lets the C compiler look at `body` below the includes.
fn compile(body: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("layout.c");
    let head = "#include <errno.h>\n\
                #include <stddef.h>\n\
                #include <linux/kvmi.h>\n\
                #include <linux/kvmmem.h>\n\
                #include <linux/kvm_para.h>\n";
    fs::write(&source, head.to_owned() + body).unwrap();
    let output = Command::new("cc")
        .args(["-std=gnu11", "-fsyntax-only", "-I"])
        .arg(uapi())
        .arg(&source)
        .output()
        .expect("a C compiler is needed to compare the definitions of Rust and C");
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn assert_equal(c: &str, value: impl Into<i128>) -> String {
    let value = value.into();
    format!("_Static_assert(({c}) == {value}, \"Rust says {value}\");\n")
}

#[test]
fn structures_of_c_and_rust_are_the_same() {
    let mut body = String::new();
    for s in table::structs() {
        let c = s.c_type;
        body += &assert_equal(&format!("sizeof({c})"), s.size as i64);
        for (field, offset, size) in &s.fields {
            body += &assert_equal(&format!("offsetof({c}, {field})"), *offset as i64);
            body += &assert_equal(&format!("sizeof((({c} *)0)->{field})"), *size as i64);
        }
        // No field is forgotten in the table, nor is there padding.
        let sum: usize = s.fields.iter().map(|(_, _, size)| size).sum();
        assert_eq!(sum, s.size, "{c}");
    }
    compile(&body).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn numbers_of_c_and_rust_are_the_same() {
    let mut body = String::new();
    for (name, value) in table::constants() {
        body += &assert_equal(&name, value);
    }
    for (name, value) in table::errors() {
        let check = assert_equal(name, value);
        // Older headers lack what the protocol has added.
        write!(body, "#ifdef {name}\n{check}#endif\n").unwrap();
    }
    compile(&body).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn error_numbers_that_kvm_has_always_had_are_in_its_header() {
    let old = [
        "KVM_ENOSYS",
        "KVM_EFAULT",
        "KVM_EINVAL",
        "KVM_E2BIG",
        "KVM_EPERM",
        "KVM_EOPNOTSUPP",
    ];
    let mut body = String::new();
    for (name, value) in table::errors().filter(|(name, _)| old.contains(name)) {
        body += &assert_equal(name, value);
    }
    compile(&body).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn c_defines_nothing_that_rust_does_not_know() {
    // What only helps to define the rest.
    const HELPERS: [&str; 2] = ["KVMI_VM_MESSAGE_ID", "KVMI_VCPU_MESSAGE_ID"];

    let mut known: BTreeSet<String> = table::constants().into_iter().map(|c| c.0).collect();
    known.extend(table::structs().into_iter().map(|s| s.c_type.to_owned()));
    known.extend(HELPERS.map(str::to_owned));

    let mut defined = 0;
    for header in ["linux/kvmi.h", "asm/kvmi.h", "linux/kvmmem.h"] {
        for line in fs::read_to_string(uapi().join(header)).unwrap().lines() {
            if let Some(name) = defines(line) {
                assert!(
                    known.contains(&name),
                    "{header} has {name}: add it to rust/abi and here"
                );
                defined += 1;
            }
        }
    }
    assert!(
        defined > 50,
        "only {defined} definitions found in the headers"
    );
}

/// What a line of a header defines, if anything.
fn defines(line: &str) -> Option<String> {
    let word = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    if let Some(rest) = line.strip_prefix("#define ") {
        return Some(word(rest)).filter(|name| !name.starts_with("_UAPI"));
    }
    if line.starts_with("struct ") && line.ends_with('{') {
        return line.strip_suffix('{').map(|s| s.trim_end().to_owned());
    }
    let enumerator = line.strip_prefix('\t').filter(|l| l.starts_with("KVM"))?;
    enumerator.contains('=').then(|| word(enumerator))
}

#[test]
fn a_difference_would_be_found() {
    let errors = compile(&assert_equal("sizeof(struct kvmi_msg_hdr)", 9)).unwrap_err();
    assert!(errors.contains("Rust says 9"), "{errors}");
    let errors = compile(&assert_equal("KVMI_NO_SUCH_THING", 1)).unwrap_err();
    assert!(errors.contains("KVMI_NO_SUCH_THING"), "{errors}");
}
