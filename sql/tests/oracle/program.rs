//! Random streams, events on them, and metrics over them.

use arrow::array::{
    ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use engine::event::StreamName;
use std::collections::BTreeSet;
use std::sync::Arc;
use streams::schema::{Column, ColumnType, StreamSchema, UnknownFields};

/// SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub(super) fn within(&mut self, low: i64, high: i64) -> i64 {
        low + (self.next() % (high - low + 1) as u64) as i64
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(super) fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[(self.next() % all.len() as u64) as usize]
    }
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Null,
    Text(&'static str),
    /// An integer, an instant, or the digits of a decimal.
    Int(i64),
    Float(f64),
    Bool(bool),
}

#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) ts: i64,
    /// Which set it is of; every metric groups by it, so that batch SQL answers many sets at once.
    pub(super) set: i64,
    /// Its place in the set.
    pub(super) seq: i64,
    pub(super) values: Vec<Value>,
}

/// One random column.
struct Field {
    name: String,
    kind: ColumnType,
    nullable: bool,
    /// Integers and the digits of decimals lie within this distance of zero.
    most: i64,
}

/// A random stream: `set_no` and `seq`, then columns of any number and type.
pub(super) struct World {
    pub(super) schema: StreamSchema,
    fields: Vec<Field>,
    /// Instants lie around this one.
    around: i64,
}

pub(super) fn stream() -> StreamName {
    "test.events".parse().unwrap()
}

const DAY: i64 = 86_400_000_000;

impl World {
    pub(super) fn new(dice: &mut Dice) -> World {
        let kinds = ["utf8", "utf8", "int64", "int64", "float64", "float64", "bool", "timestamp", "decimal(12,2)"];
        let fields: Vec<Field> = (0..dice.within(2, 7))
            .map(|at| {
                let kind = match dice.chance(5) {
                    true => ColumnType::Decimal(30, 6),
                    false => dice.pick(&kinds).parse().unwrap(),
                };
                let most = *dice.pick(&[2, 5, 50, 50, 100_000, 1_000_000_000_000]);
                Field { name: format!("c{at}"), kind, nullable: dice.chance(70), most }
            })
            .collect();
        let column = |name: &str, kind, nullable| Column { name: name.to_owned(), kind, nullable };
        let columns = ["set_no", "seq"].map(|name| column(name, ColumnType::Int64, false)).into_iter();
        let columns = columns.chain(fields.iter().map(|f| column(&f.name, f.kind, f.nullable))).collect();
        let schema = StreamSchema::new(stream(), columns, UnknownFields::Keep).unwrap();
        // 1970, a day before, 2026, the year 1 and the year 9999
        let around = *dice.pick(&[0, 0, -DAY, 20_463 * DAY + 52_200_000_000, -719_162 * DAY, 2_932_800 * DAY]);
        World { schema, fields, around }
    }

    pub(super) fn events(&self, dice: &mut Dice, set: i64) -> Vec<Event> {
        let count = dice.within(1, 60);
        // few keys meet in the same windows, many do not; some sets are dense in time and some sparse
        let (keys, spread) = (dice.within(1, 7) as usize, *dice.pick(&[20_000_000i64, 120_000_000, 400_000_000]));
        let event = |seq| {
            let at = self.around + dice.within(-spread, spread);
            let ts = if dice.chance(50) { at - at.rem_euclid(1_000_000) } else { at };
            let value = |field: &Field| match field.nullable && dice.chance(12) {
                true => Value::Null,
                false => self.value(field, keys, dice),
            };
            Event { ts, set, seq, values: self.fields.iter().map(value).collect() }
        };
        (0..count).map(event).collect()
    }

    fn value(&self, field: &Field, keys: usize, dice: &mut Dice) -> Value {
        const TEXTS: [&str; 7] =
            ["a", "b", "", "ä", "sixteen bytes, so", "sixteen bytes !!", "much longer than sixteen bytes"];
        match field.kind {
            ColumnType::Utf8 | ColumnType::Json => Value::Text(TEXTS[dice.within(0, keys as i64 - 1) as usize]),
            ColumnType::Int64 | ColumnType::Decimal(..) => Value::Int(dice.within(-field.most, field.most)),
            ColumnType::Timestamp => Value::Int(self.around + dice.within(-9, 9) * 1_000_000),
            ColumnType::Bool => Value::Bool(dice.chance(50)),
            ColumnType::Float64 => Value::Float(match dice.within(0, 59) {
                0 | 1 => f64::NAN,
                2 | 3 => 0.0,
                4 => f64::INFINITY,
                5 => f64::NEG_INFINITY,
                _ => dice.within(-4_000, 4_000) as f64 / 8.0,
            }),
        }
    }

    pub(super) fn batch<'a>(&self, events: impl Iterator<Item = &'a Event> + Clone) -> RecordBatch {
        let times = |values: Vec<Option<i64>>| -> ArrayRef {
            Arc::new(TimestampMicrosecondArray::from(values).with_timezone("+00:00"))
        };
        let ints =
            |of: fn(&Event) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(events.clone().map(of))) };
        let texts = || -> ArrayRef { Arc::new(StringArray::new_null(events.clone().count())) };
        let mut columns = vec![times(events.clone().map(|e| Some(e.ts)).collect()), texts()];
        columns.extend([ints(|e| e.set), ints(|e| e.seq)]);
        for (at, field) in self.fields.iter().enumerate() {
            let values = || events.clone().map(|event| &event.values[at]);
            let numbers = || values().map(|v| if let Value::Int(n) = v { Some(*n) } else { None });
            columns.push(match field.kind {
                ColumnType::Utf8 | ColumnType::Json => Arc::new(StringArray::from_iter(
                    values().map(|v| if let Value::Text(text) = v { Some(*text) } else { None }),
                )),
                ColumnType::Int64 => Arc::new(Int64Array::from_iter(numbers())),
                ColumnType::Timestamp => times(numbers().collect()),
                ColumnType::Decimal(precision, scale) => {
                    let digits = Decimal128Array::from_iter(numbers().map(|n| n.map(i128::from)));
                    Arc::new(digits.with_precision_and_scale(precision, scale).unwrap())
                }
                ColumnType::Bool => Arc::new(BooleanArray::from_iter(
                    values().map(|v| if let Value::Bool(flag) = v { Some(*flag) } else { None }),
                )),
                ColumnType::Float64 => Arc::new(Float64Array::from_iter(
                    values().map(|v| if let Value::Float(x) = v { Some(*x) } else { None }),
                )),
            });
        }
        columns.push(texts());
        RecordBatch::try_new(self.schema.arrow().clone(), columns).unwrap()
    }
}

impl Field {
    /// Aggregates of this column whose result does not hang on the order of events or on rounding.
    fn exact(&self) -> Vec<String> {
        let mut calls = vec!["count({})"];
        calls.extend(match self.kind {
            ColumnType::Int64 => &["sum({})", "min({})", "max({})"][..],
            ColumnType::Utf8 | ColumnType::Json | ColumnType::Timestamp => &["min({})", "max({})"],
            ColumnType::Decimal(..) => &["sum({})", "max({})"],
            ColumnType::Bool => &["bool_or({})"],
            ColumnType::Float64 => &[],
        });
        self.named(&calls)
    }

    fn aggregates(&self) -> Vec<String> {
        let mut calls = vec![
            "count({})",
            "count(DISTINCT {})",
            "first_value({} ORDER BY ts, seq)",
            "last_value({} ORDER BY ts, seq)",
            "array_agg({} ORDER BY ts, seq)",
            "nth_value({}, 2 ORDER BY ts, seq)",
            "nth_value({}, -1 ORDER BY ts, seq)",
        ];
        calls.extend(match self.kind {
            ColumnType::Int64 => &[
                "sum({})",
                "avg({})",
                "min({})",
                "max({})",
                "sum(DISTINCT {})",
                "median({})",
                "approx_distinct({})",
                "max({}) - min({})",
                "sum({} * 2) / count(*)",
                "sum(CASE WHEN {} > 0 THEN {} ELSE 0 END)",
                "coalesce(sum({}) FILTER (WHERE {} > 1000000000000000), 0)",
                "sum({}) / nullif(sum({}), 0)",
                "last_value({} ORDER BY ts, seq) - first_value({} ORDER BY ts, seq)",
            ][..],
            ColumnType::Float64 => &[
                "sum({})",
                "avg({})",
                // DataFusion's grouped min and max over NaN depend on the order of rows; ours are by total order
                "min({}) FILTER (WHERE NOT isnan({}))",
                "max({}) FILTER (WHERE NOT isnan({}))",
                "sum({} * 0.5) / nullif(count({}), 0)",
                "avg(abs({})) FILTER (WHERE {} > 0)",
            ],
            ColumnType::Decimal(..) => &["sum({})", "min({})", "max({})", "sum({} * 2)"],
            ColumnType::Utf8 | ColumnType::Json => &[
                "min({})",
                "max({})",
                "max(length({}))",
                "approx_distinct({})",
                "string_agg({}, ',' ORDER BY ts, seq)",
            ],
            ColumnType::Bool => &["bool_or({})", "bool_and({})", "count(*) FILTER (WHERE {})"],
            ColumnType::Timestamp => &["min({})", "max({})", "count(*) FILTER (WHERE {} < ts)"],
        });
        if matches!(self.kind, ColumnType::Int64) && self.most <= 50 {
            calls.extend(["stddev({})", "var_pop({})", "corr({}, seq)", "covar_pop({}, seq)", "bit_or({})"]);
        }
        self.named(&calls)
    }

    fn conditions(&self) -> Vec<String> {
        self.named(match self.kind {
            ColumnType::Utf8 | ColumnType::Json => {
                &["{} <> 'a'", "{} LIKE '%e%'", "{} IS NULL", "{} IN ('a', 'ä', '')"]
            }
            ColumnType::Int64 => {
                &["{} > 0", "{} % 2 = 0", "{} IS NOT NULL", "{} BETWEEN -1 AND 3", "{} > 2000000000000"]
            }
            ColumnType::Float64 => &["{} > 0", "isnan({})", "{} > 1e9", "{} IS NOT NULL"],
            ColumnType::Decimal(..) => &["{} > 0", "{} IS NULL OR {} < 1"],
            ColumnType::Bool => &["{}", "NOT {}", "{} IS NOT TRUE"],
            ColumnType::Timestamp => &["{} < ts", "{} IS NOT NULL"],
        })
    }

    fn keys(&self) -> Vec<String> {
        self.named(match self.kind {
            ColumnType::Utf8 | ColumnType::Json => &["{}", "{}", "upper({})", "length({})"],
            ColumnType::Int64 => {
                &["{}", "{}", "{} % 3", "coalesce({}, 0)", "CASE WHEN {} > 0 THEN 'up' ELSE 'down' END"]
            }
            // a key that is no finite number is NULL to a metric, and a group of its own to batch SQL
            ColumnType::Float64 => {
                &["CASE WHEN abs({}) < 1e300 THEN {} END", "{} > 0", "CASE WHEN abs({}) < 1e300 THEN floor({}) END"]
            }
            ColumnType::Decimal(..) => &["{}", "{} > 0"],
            ColumnType::Bool => &["{}", "{}", "{} IS TRUE"],
            ColumnType::Timestamp => &["{}", "{} < ts"],
        })
    }

    fn named(&self, templates: &[&str]) -> Vec<String> {
        templates.iter().map(|template| template.replace("{}", &self.name)).collect()
    }
}

/// `ORDER BY … LIMIT … OFFSET …` of a metric.
#[derive(Clone, Debug)]
pub(super) struct Top {
    pub(super) order: String,
    pub(super) limit: i64,
    pub(super) offset: i64,
}

/// A metric's SQL and what the batch side needs to know of it.
#[derive(Clone, Debug)]
pub(super) struct Query {
    /// Without [`Query::top`].
    pub(super) text: String,
    pub(super) filter: Option<String>,
    /// Expressions of GROUP BY behind `set_no`.
    pub(super) keys: Vec<String>,
    /// Names of the columns behind the bounds.
    pub(super) columns: Vec<String>,
    pub(super) top: Option<Top>,
}

impl Query {
    /// The metric.
    pub(super) fn sql(&self) -> String {
        match &self.top {
            None => self.text.clone(),
            Some(Top { order, limit, offset }) => {
                format!("{} ORDER BY {order} LIMIT {limit} OFFSET {offset}", self.text)
            }
        }
    }

    pub(super) fn key_count(&self) -> usize {
        self.keys.len() + 1
    }
}

fn window(dice: &mut Dice) -> String {
    match dice.next() % 4 {
        0 => format!("tumble(ts, INTERVAL '{} seconds')", dice.within(1, 120)),
        1 => {
            let slide = dice.within(1, 30);
            let size = slide * dice.within(1, 8) + if dice.chance(30) { dice.within(0, slide - 1) } else { 0 };
            format!("hop(ts, INTERVAL '{slide} seconds', INTERVAL '{size} seconds')")
        }
        2 => {
            let step = dice.within(1, 30);
            format!("cumulate(ts, INTERVAL '{step} seconds', INTERVAL '{} seconds')", step * dice.within(1, 8))
        }
        _ => format!("session(ts, INTERVAL '{} seconds')", dice.within(1, 30)),
    }
}

impl World {
    /// One of `all` that some column has.
    fn one(&self, dice: &mut Dice, all: fn(&Field) -> Vec<String>) -> String {
        let all = all(dice.pick(&self.fields));
        dice.pick(&all).clone()
    }

    pub(super) fn query(&self, dice: &mut Dice) -> Query {
        let window = window(dice);
        let keys: BTreeSet<String> = match dice.within(0, 3) {
            0 => BTreeSet::new(),
            most => (0..dice.within(1, most)).map(|_| self.one(dice, Field::keys)).collect(),
        };
        let keys: Vec<String> = keys.into_iter().collect();
        let filter = dice.chance(45).then(|| self.one(dice, Field::conditions));
        let mut calls: Vec<String> = vec![match dice.chance(30) {
            true => "count(*)".to_owned(),
            false => self.one(dice, Field::exact),
        }];
        for _ in 0..dice.within(0, 5) {
            let call = self.one(dice, Field::aggregates);
            // DataFusion's last_value takes one from the length of a batch without rows, which a debug build notices
            let is_plain = call.matches('(').count() == 1 && !["FILTER", "last_value"].iter().any(|w| call.contains(w));
            let call = match dice.chance(15) && is_plain {
                true => format!("{call} FILTER (WHERE {})", self.one(dice, Field::conditions)),
                false => call,
            };
            if !calls.contains(&call) {
                calls.push(call);
            }
        }
        let having = dice.chance(30).then(|| match dice.chance(50) {
            true => "count(*) > 1".to_owned(),
            false => format!("{} IS NOT NULL OR count(*) > 2", calls[0]),
        });
        let top = (!window.starts_with("session") && dice.chance(25)).then(|| {
            let way = dice.pick(&["", "DESC", "ASC NULLS FIRST", "DESC NULLS LAST"]);
            let mut order = vec![format!("v0 {way}")];
            order.extend((0..keys.len()).map(|at| format!("k{at} {}", dice.pick(&["", "DESC"]))));
            Top { order: order.join(", "), limit: dice.within(1, 3), offset: *dice.pick(&[0, 0, 0, 1]) }
        });
        let mut columns = vec!["set_no".to_owned()];
        columns.extend((0..keys.len()).map(|at| format!("k{at}")));
        columns.extend((0..calls.len()).map(|at| format!("v{at}")));
        let select: Vec<String> = std::iter::once("set_no".to_owned())
            .chain(keys.iter().enumerate().map(|(at, key)| format!("{key} AS k{at}")))
            .chain(calls.iter().enumerate().map(|(at, call)| format!("{call} AS v{at}")))
            .collect();
        let clause =
            |word: &str, text: &Option<String>| text.as_ref().map_or(String::new(), |text| format!(" {word} {text}"));
        let groups: String = keys.iter().map(|key| format!(", {key}")).collect();
        let text = format!(
            "SELECT window_start, window_end, {} FROM test.events{} GROUP BY {window}, set_no{groups}{}",
            select.join(", "),
            clause("WHERE", &filter),
            clause("HAVING", &having)
        );
        Query { text, filter, keys, columns, top }
    }
}
