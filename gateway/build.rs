//! The console is embedded as it was built; without a build of it the crate compiles all the same.

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=web/dist");
    std::fs::create_dir_all("web/dist")
}
