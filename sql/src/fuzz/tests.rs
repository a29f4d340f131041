#[path = "../../../tests/support/smoke.rs"]
mod smoke;

#[test]
fn any_text_is_a_program_or_an_error() {
    smoke::smoke("sql", &super::texts(), super::WORDS, 5_000, super::sql);
}
