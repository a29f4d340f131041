use super::*;

#[path = "../../../tests/support/smoke.rs"]
mod smoke;

#[test]
fn an_arrow_body_that_lies_about_its_lengths_is_refused() {
    for body in [arrow(&trades(1)), arrow(&unlike())] {
        for at in 1..body.len() {
            for wrong in [0, 0x7f, 0xff] {
                let mut body = body.clone();
                body[at] = wrong;
                events(&body); // it panicked at a count of rows beyond the buffers
            }
        }
    }
}

#[test]
fn any_body_gives_events_or_errors() {
    smoke::smoke("events", &bodies(), WORDS, 100_000, events);
}

#[test]
fn any_file_is_read_as_far_as_it_is_a_log_and_what_is_wrong_with_it_is_told() {
    smoke::smoke("log_file", &files(), &[], 1_500, log_file);
}
