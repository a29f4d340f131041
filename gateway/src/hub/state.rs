//! What the messages of a state channel add up to: named members, each as the JSON it has on the wire.

use crate::encode::MetricRow;
use engine::event::Micros;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::sync::Arc;

/// Where in the client's document the members are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// In the object `rows`.
    Rows,
    /// They are the document.
    Root,
}

/// A change of one member.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Op {
    pub(super) name: Arc<str>,
    /// `None` takes it away; it must be there.
    pub(super) member: Option<Member>,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Member {
    pub(super) json: Arc<str>,
    /// Of a metric's row: the end of its window, whether it is final, and its revision.
    age: (Micros, bool, i64),
}

impl Member {
    fn of(row: &MetricRow) -> Member {
        Member { json: row.json.clone(), age: (row.window_end, row.is_final, row.revision) }
    }

    pub(super) fn is_final(&self) -> bool {
        self.age.1
    }
}

/// Rows of windows before the newest are kept as long as all rows together take no more than this.
const BYTES_MAX: usize = 4 << 20;

/// Bytes of a member in the document, about.
fn size(name: &str, member: &Member) -> usize {
    name.len() + member.json.len() + 8
}

/// A member and when it changed.
struct Held {
    member: Member,
    /// Offset of the message with its last change.
    changed: u64,
    /// The last final row it was, and the offset of the message with that.
    last_final: Option<(Arc<str>, u64)>,
}

pub(super) struct State {
    place: Place,
    members: BTreeMap<Arc<str>, Held>,
    bytes: usize,
    /// Offset of the message with the last removal.
    removed: u64,
}

impl State {
    pub(super) fn new(place: Place) -> State {
        State { place, members: BTreeMap::new(), bytes: 0, removed: 0 }
    }

    /// Takes all members away, which the message at `offset` tells.
    pub(super) fn clear(&mut self, offset: u64) {
        self.members.clear();
        self.bytes = 0;
        self.removed = offset;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Bytes of the document, about.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes a change, which the message at `offset` tells.
    pub(super) fn apply(&mut self, op: Op, offset: u64) {
        let old = self.members.remove(&op.name);
        self.bytes -= old.as_ref().map_or(0, |old| size(&op.name, &old.member));
        match op.member {
            Some(member) => {
                self.bytes += size(&op.name, &member);
                let last_final = if member.is_final() {
                    Some((member.json.clone(), offset))
                } else {
                    old.and_then(|old| old.last_final)
                };
                self.members.insert(op.name, Held { member, changed: offset, last_final });
            }
            None => self.removed = offset,
        }
    }

    /// The whole as a JSON document.
    pub(super) fn document(&self) -> String {
        let mut out = String::with_capacity(self.bytes + 16);
        out.push_str(if self.place == Place::Rows { "{\"rows\":{" } else { "{" });
        for (at, (name, held)) in self.members.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            _ = write!(out, "{comma}{}:{}", quoted(name), held.member.json); // writing to a String cannot fail
        }
        out.push_str(if self.place == Place::Rows { "}}" } else { "}" });
        out
    }

    /// Appends a change as an operation of JSON Patch.
    pub(super) fn write(&self, op: &Op, out: &mut String) {
        if !out.is_empty() {
            out.push(',');
        }
        let prefix = if self.place == Place::Rows { "/rows/" } else { "/" };
        let path = quoted(&format!("{prefix}{}", op.name.replace('~', "~0").replace('/', "~1")));
        _ = match &op.member {
            // `add` also replaces what is there
            Some(member) => write!(out, "{{\"op\":\"add\",\"path\":{path},\"value\":{}}}", member.json),
            None => write!(out, "{{\"op\":\"remove\",\"path\":{path}}}"),
        };
    }

    /// The operations that bring a client at `offset` up to date, each member behind its last final row where that is
    /// another one; `None` where one was taken away since, since nobody knows whether the client ever had it.
    pub(super) fn delta_since(&self, offset: u64) -> Option<String> {
        if self.removed > offset {
            return None;
        }
        let mut out = String::new();
        for (name, held) in self.members.iter().filter(|(_, held)| held.changed > offset) {
            let missed = held.last_final.as_ref().filter(|(json, at)| *at > offset && *json != held.member.json);
            if let Some((json, _)) = missed {
                let shown = Member { json: json.clone(), age: held.member.age };
                self.write(&Op { name: name.clone(), member: Some(shown) }, &mut out);
            }
            self.write(&Op { name: name.clone(), member: Some(held.member.clone()) }, &mut out);
        }
        Some(out)
    }

    /// What changes when the members are to be exactly these.
    pub(super) fn replace(&self, members: impl IntoIterator<Item = (String, String)>) -> Vec<Op> {
        let new: BTreeMap<String, String> = members.into_iter().collect();
        let gone = self.members.keys().filter(|name| !new.contains_key(&***name));
        let mut ops: Vec<Op> = gone.map(|name| Op { name: name.clone(), member: None }).collect();
        for (name, json) in new {
            if self.members.get(name.as_str()).is_none_or(|old| *old.member.json != *json) {
                let member = Member { json: json.into(), age: (Micros::ZERO, false, 0) };
                ops.push(Op { name: name.into(), member: Some(member) });
            }
        }
        ops
    }

    /// What changes with new rows of a metric, in their order.
    ///
    /// Rows of a window older than a key's row are shown, where final, and the key's row is put back behind them, so
    /// that every final row is seen and the state ends at the newest. `gone`: keys that left their window, by HAVING;
    /// `is_complete`: the rows are all of their window, so other keys have left it.
    pub(super) fn rows(&self, rows: &[MetricRow], gone: &[String], is_complete: bool, is_final: bool) -> Vec<Op> {
        let mut ops = Vec::new();
        let end = rows.iter().map(|row| row.window_end).max();
        for row in rows {
            let op = |member| Op { name: row.key.clone(), member: Some(member) };
            let new = Member::of(row);
            match self.members.get(&row.key).map(|held| &held.member) {
                Some(old) if old.age.0 > new.age.0 => {
                    if row.is_final {
                        ops.extend([op(new), op(old.clone())]);
                    }
                }
                // of one window: final stands before provisional, and a higher revision before a lower
                Some(old) if old.age >= new.age && (old.age != new.age || old.json == new.json) => {}
                _ => ops.push(op(new)),
            }
        }
        let is_older = |member: &Member| end.is_none_or(|end| member.age.0 <= end);
        let gone = gone.iter().filter_map(|key| self.members.get_key_value(key.as_str()));
        // without rows nothing tells the window: a final row is not taken away by a provisional change
        let left = gone.filter(|(_, held)| is_older(&held.member) && (is_final || !held.member.is_final()));
        ops.extend(left.map(|(name, _)| Op { name: name.clone(), member: None }));
        if is_complete {
            let kept: HashSet<&str> = rows.iter().map(|row| &*row.key).collect();
            let left = self.members.iter().filter(|(name, held)| is_older(&held.member) && !kept.contains(&***name));
            ops.extend(left.map(|(name, _)| Op { name: name.clone(), member: None }));
        }
        if self.bytes > BYTES_MAX {
            self.forget(&mut ops);
        }
        ops
    }

    /// Takes away the oldest rows of windows before the newest, so that keys that do not come again take no room.
    fn forget(&self, ops: &mut Vec<Op>) {
        let touched: HashSet<&str> = ops.iter().map(|op| &*op.name).collect();
        let newest = self.members.values().map(|held| held.member.age.0).max();
        let mut old: Vec<(&Arc<str>, &Member)> = (self.members.iter().map(|(name, held)| (name, &held.member)))
            .filter(|(name, member)| Some(member.age.0) < newest && !touched.contains(&***name))
            .collect();
        old.sort_unstable_by_key(|(_, member)| member.age);
        let mut left = self.bytes;
        let enough = BYTES_MAX - BYTES_MAX / 4; // some at a time, so that not every update sorts
        let mut gone = Vec::new();
        for (name, member) in old {
            if left <= enough {
                break;
            }
            left -= size(name, member);
            gone.push(Op { name: name.clone(), member: None });
        }
        ops.extend(gone);
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// `key end` provisional, `key end!` final, `key end!1` first correction.
    fn row(script: &str) -> MetricRow {
        let (key, rest) = script.split_once(' ').unwrap();
        let (end, revision) = rest.split_once('!').map_or((rest, None), |(end, n)| (end, Some(n.parse().unwrap_or(0))));
        let window_end = Micros(end.parse().unwrap());
        let (is_final, revision) = (revision.is_some(), revision.unwrap_or(0));
        let json = json!({"end": window_end, "final": is_final, "revision": revision}).to_string().into();
        MetricRow { key: key.into(), pairs: Vec::new(), json, window_end, is_final, revision }
    }

    fn rows(script: &str) -> Vec<MetricRow> {
        script.split(", ").filter(|row| !row.is_empty()).map(row).collect()
    }

    fn shown(ops: &[Op]) -> String {
        let op = |op: &Op| match &op.member {
            None => format!("-{}", op.name),
            Some(Member { age: (end, is_final, n), .. }) => {
                let mark = if *is_final { format!("!{n}") } else { String::new() };
                format!("{} {}{mark}", op.name, end.0)
            }
        };
        ops.iter().map(op).collect::<Vec<_>>().join(", ")
    }

    fn check(before: &str, new: &str, gone: &[&str], is_complete: bool, expected: &str) {
        let mut state = State::new(Place::Rows);
        for row in rows(before) {
            state.apply(Op { name: row.key.clone(), member: Some(Member::of(&row)) }, 1);
        }
        let gone: Vec<String> = gone.iter().map(|key| (*key).to_owned()).collect();
        let new = rows(new);
        let is_final = new.first().is_some_and(|row| row.is_final);
        assert_eq!(shown(&state.rows(&new, &gone, is_complete, is_final)), expected, "{before} + {new:?}");
    }

    #[test]
    fn a_newer_row_takes_the_place_of_an_older_one() {
        check("", "a 10", &[], false, "a 10");
        check("a 10", "a 10!", &[], false, "a 10!0");
        check("a 10!0", "a 10!1", &[], false, "a 10!1");
        check("a 10!1", "a 20, b 20", &[], false, "a 20, b 20");
    }

    #[test]
    fn a_final_row_of_an_older_window_is_shown_before_the_newest_row() {
        check("a 20", "a 10!", &[], false, "a 10!0, a 20");
        check("a 20", "a 10", &[], false, "");
        check("a 10!1", "a 10!0", &[], false, "");
        check("a 10!0", "a 10", &[], false, "");
    }

    #[test]
    fn a_key_that_left_its_window_is_removed() {
        check("a 10, b 10", "b 10", &["a"], false, "-a");
        check("a 20, b 10", "b 10!", &["a"], false, "b 10!0");
        check("a 10!0", "", &["a"], false, "");
        check("a 10, b 10, c 20", "b 10", &[], true, "-a");
    }

    #[test]
    fn the_document_and_the_paths_escape_what_keys_may_hold() {
        let mut state = State::new(Place::Rows);
        let op = Op { name: "a/b~\"c".into(), member: Some(Member::of(&row("x 1"))) };
        let mut patch = String::new();
        state.write(&op, &mut patch);
        let mut document: Value = json!({"rows": {}});
        let patch: json_patch::Patch = serde_json::from_str(&format!("[{patch}]")).unwrap();
        json_patch::patch(&mut document, &patch).unwrap();
        state.apply(op.clone(), 1);
        assert_eq!(document, serde_json::from_str::<Value>(&state.document()).unwrap());
        state.apply(Op { member: None, ..op }, 2);
        assert_eq!((state.document().as_str(), state.bytes()), ("{\"rows\":{}}", 0));
    }

    #[test]
    fn rows_of_past_windows_give_way_where_all_rows_take_too_much_room() {
        let mut state = State::new(Place::Rows);
        let filler: Arc<str> = format!("\"{}\"", "x".repeat(1_000)).into();
        for n in 0..20_000 {
            let new = MetricRow { json: filler.clone(), ..row(&format!("k{n} {}!", n / 100)) };
            state.rows(&[new], &[], false, true).into_iter().for_each(|op| state.apply(op, 1));
            assert!(state.bytes() <= BYTES_MAX + 2_000);
        }
        assert!(state.members.contains_key("k19999") && !state.members.contains_key("k0"));
    }

    #[test]
    fn only_members_that_differ_are_replaced() {
        let mut state = State::new(Place::Root);
        let members = |text: &str| -> Vec<(String, String)> {
            text.split(' ').filter_map(|m| m.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
        };
        state.replace(members("a=1 b=2")).into_iter().for_each(|op| state.apply(op, 1));
        let names: Vec<String> = state.replace(members("b=2 a=3 c=4")).iter().map(|op| op.name.to_string()).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(state.document(), "{\"a\":1,\"b\":2}");
    }
}
