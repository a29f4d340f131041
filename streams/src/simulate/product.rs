//! A subscription business: visitors come in sessions, some sign up, some of those try and some pay; subscribers
//! are invoiced and leave; money goes out as well.

use super::dice::Dice;
use super::{Acts, daily_wave, seconds, weekday};
use engine::event::Micros;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

const STREAM: &str = "analytics.events";

/// Plans: name, price a month in USD, share of subscribers.
const PLANS: [(&str, f64, f64); 4] =
    [("starter", 19.0, 0.55), ("team", 49.0, 0.28), ("business", 99.0, 0.13), ("scale", 299.0, 0.04)];

/// Pages of the site: path, and how often it is seen.
const PAGES: [(&str, f64); 10] = [
    ("/", 5.0),
    ("/pricing", 2.4),
    ("/features", 2.0),
    ("/docs", 1.8),
    ("/blog/streaming-metrics", 1.4),
    ("/blog/alerts-that-matter", 1.1),
    ("/customers", 0.8),
    ("/changelog", 0.6),
    ("/about", 0.5),
    ("/app", 3.0),
];
const REFERRERS: [(&str, f64); 6] =
    [("google", 4.0), ("direct", 3.0), ("newsletter", 1.0), ("linkedin", 0.8), ("producthunt", 0.4), ("github", 0.8)];
const COUNTRIES: [(&str, f64); 8] =
    [("US", 4.0), ("DE", 1.4), ("GB", 1.2), ("FR", 0.8), ("IN", 1.1), ("BR", 0.6), ("JP", 0.5), ("CA", 0.7)];
const DEVICES: [(&str, f64); 3] = [("desktop", 6.0), ("mobile", 3.5), ("tablet", 0.5)];
const REASONS: [&str; 5] = ["too_expensive", "missing_feature", "switched", "no_longer_needed", "payment_failed"];
/// What the business pays for: category, vendor, median USD.
const EXPENSES: [(&str, &str, f64); 6] = [
    ("advertising", "Google Ads", 180.0),
    ("advertising", "LinkedIn Ads", 140.0),
    ("cloud", "AWS", 95.0),
    ("software", "GitHub", 21.0),
    ("payments", "Stripe fees", 38.0),
    ("contractors", "Upwork", 420.0),
];

/// Sessions a second at normal pace, and pages of a session.
const SESSIONS: f64 = 3.2;
const PAGES_A_SESSION: f64 = 4.6;
/// Visitors and subscribers at the start. Returning visitors are a third of all.
const VISITORS: u64 = 400_000;
const SUBSCRIBERS: usize = 40_000;
/// Subscribers are invoiced once in this many seconds: 30 days.
const MONTH: f64 = 30.0 * 86_400.0;
/// Leaving: this share of subscribers a month.
const CHURN_A_MONTH: f64 = 0.08;
const EXPENSES_A_DAY: f64 = 140.0;
/// The most sessions, trials and subscribers that are kept; beyond it new ones are turned away.
const OPEN_MAX: usize = 20_000;
const SUBSCRIBERS_MAX: usize = 200_000;

pub(super) struct Product {
    /// What is due, by time; `order` breaks ties.
    due: BinaryHeap<Reverse<Due>>,
    order: u64,
    subscribers: Vec<Subscriber>,
    users: u64,
    sessions: u64,
}

struct Subscriber {
    user: u64,
    plan: usize,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: Micros,
    order: u64,
    what: What,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// A visitor arrives; the next arrival follows.
    Arrival,
    /// The next page of a session.
    Page(Session),
    /// A trial ends: with a subscription, or with nothing.
    TrialEnds {
        user: u64,
        session: u64,
    },
    Invoice,
    Cancellation,
    Expense,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Session {
    id: u64,
    user: u64,
    is_known: bool,
    pages_left: u32,
    country: &'static str,
    device: &'static str,
    referrer: &'static str,
}

impl Product {
    pub fn new(dice: &mut Dice, start: Micros) -> Product {
        let subscriber = |_| Subscriber { user: 1 + dice.below(VISITORS as usize) as u64, plan: plan(dice) };
        let subscribers = (0..SUBSCRIBERS).map(subscriber).collect();
        let mut product = Product { due: BinaryHeap::new(), order: 0, subscribers, users: VISITORS, sessions: 0 };
        for what in [What::Arrival, What::Invoice, What::Cancellation, What::Expense] {
            product.after(start, dice.unit(), what);
        }
        product
    }

    /// The next thing that is due; returns when the one after it is.
    pub fn act(&mut self, at: Micros, dice: &mut Dice, acts: &mut Acts) -> Micros {
        while let Some(Reverse(Due { at: due, .. })) = self.due.peek() {
            // Two things of one microsecond happen in one act, so that time always ascends.
            if *due > at {
                return *due;
            }
            let Some(Reverse(Due { what, .. })) = self.due.pop() else { break };
            self.happen(at, what, dice, acts);
        }
        unreachable!("an arrival is always due")
    }

    fn after(&mut self, at: Micros, wait: f64, what: What) {
        self.order += 1;
        self.due.push(Reverse(Due { at: at.plus(seconds(wait)), order: self.order, what }));
    }

    fn happen(&mut self, at: Micros, what: What, dice: &mut Dice, acts: &mut Acts) {
        let pace = pace(at);
        let subscribers = self.subscribers.len().max(1) as f64;
        match what {
            What::Arrival => {
                self.after(at, dice.exponential(1.0 / (SESSIONS * pace)), What::Arrival);
                if self.due.len() < OPEN_MAX {
                    let session = self.arrive(dice);
                    self.page(at, session, dice, acts);
                }
            }
            What::Page(session) => self.page(at, session, dice, acts),
            What::TrialEnds { user, session } => {
                if dice.chance(0.3) && self.subscribers.len() < SUBSCRIBERS_MAX {
                    let plan = plan(dice);
                    self.subscribers.push(Subscriber { user, plan });
                    acts.push(STREAM, money("subscription_created", user, Some(session), plan, ""));
                    acts.push(STREAM, money("invoice_paid", user, None, plan, r#","attempt":1"#));
                }
            }
            What::Invoice => {
                self.after(at, dice.exponential(MONTH / subscribers / pace), What::Invoice);
                if let Some(Subscriber { user, plan }) = self.any_subscriber(dice) {
                    let attempt = if dice.chance(0.06) { r#","attempt":2"# } else { r#","attempt":1"# };
                    acts.push(STREAM, money("invoice_paid", *user, None, *plan, attempt));
                }
            }
            What::Cancellation => {
                self.after(at, dice.exponential(MONTH / subscribers / CHURN_A_MONTH / pace), What::Cancellation);
                if self.subscribers.len() > 1 {
                    let index = dice.below(self.subscribers.len());
                    let Subscriber { user, plan } = self.subscribers.swap_remove(index);
                    let reason = format!(r#","reason":"{}""#, dice.pick(&REASONS));
                    acts.push(STREAM, money("subscription_cancelled", user, None, plan, &reason));
                }
            }
            What::Expense => {
                self.after(at, dice.exponential(86_400.0 / EXPENSES_A_DAY / pace), What::Expense);
                let (category, vendor, median) = dice.pick(&EXPENSES);
                let value = dice.log_normal(*median, 0.6);
                acts.push(
                    STREAM,
                    format!(
                        r#""event":"expense","value":{value:.2},"currency":"USD","properties":{{"category":"{category}","vendor":"{vendor}"}}"#
                    ),
                );
            }
        }
    }

    fn any_subscriber(&self, dice: &mut Dice) -> Option<&Subscriber> {
        (!self.subscribers.is_empty()).then(|| dice.pick(&self.subscribers))
    }

    fn arrive(&mut self, dice: &mut Dice) -> Session {
        let is_known = dice.chance(0.34);
        let user = if is_known {
            1 + dice.below(self.users as usize) as u64
        } else {
            self.users += 1;
            self.users
        };
        self.sessions += 1;
        Session {
            id: self.sessions,
            user,
            is_known,
            pages_left: 1 + dice.exponential(PAGES_A_SESSION - 0.5).min(40.0) as u32,
            country: one_of(dice, &COUNTRIES),
            device: one_of(dice, &DEVICES),
            referrer: one_of(dice, &REFERRERS),
        }
    }

    /// One page of a session, what it leads to, and the page after it.
    fn page(&mut self, at: Micros, mut session: Session, dice: &mut Dice, acts: &mut Acts) {
        let path = one_of(dice, &PAGES);
        let Session { id, user, country, device, referrer, .. } = session;
        let visit = visit_members(user, id);
        acts.push(
            STREAM,
            format!(
                r#""event":"page_view",{visit},"properties":{{"path":"{path}","referrer":"{referrer}","country":"{country}","device":"{device}"}}"#
            ),
        );
        let converts = if path == "/pricing" { 0.006 } else { 0.002 };
        if !session.is_known && dice.chance(converts) {
            session.is_known = true;
            let method = dice.pick(&["email", "google", "github"]);
            acts.push(
                STREAM,
                format!(
                    r#""event":"signup",{visit},"properties":{{"method":"{method}","referrer":"{referrer}","country":"{country}"}}"#
                ),
            );
            if dice.chance(0.5) {
                let plan = PLANS[plan(dice)].0;
                acts.push(
                    STREAM,
                    format!(r#""event":"trial_started",{visit},"properties":{{"plan":"{plan}","days":14}}"#),
                );
                // Days of a trial are minutes here: a demonstration should see the end of its funnel.
                self.after(at, dice.between(120.0, 2400.0), What::TrialEnds { user, session: id });
            }
        }
        session.pages_left -= 1;
        if session.pages_left > 0 {
            self.after(at, 1.5 + dice.exponential(24.0), What::Page(session));
        }
    }
}

/// Business hours in Europe and America, quiet weekends.
fn pace(at: Micros) -> f64 {
    let week = if weekday(at) >= 5 { 0.75 } else { 1.05 };
    daily_wave(at, 15.5, 0.3) * week
}

fn plan(dice: &mut Dice) -> usize {
    dice.weighted(PLANS.iter().map(|(.., share)| *share))
}

fn one_of(dice: &mut Dice, table: &[(&'static str, f64)]) -> &'static str {
    table[dice.weighted(table.iter().map(|(_, weight)| *weight))].0
}

fn visit_members(user: u64, session: u64) -> String {
    format!(r#""user_id":"u_{user:07}","session_id":"s_{session:08}""#)
}

/// An event about the price of a plan; `more` is further properties, each after a comma.
fn money(event: &str, user: u64, session: Option<u64>, plan: usize, more: &str) -> String {
    let (plan, price, _) = PLANS[plan];
    let visit = match session {
        Some(session) => visit_members(user, session),
        None => format!(r#""user_id":"u_{user:07}""#),
    };
    format!(
        r#""event":"{event}",{visit},"value":{price:.2},"currency":"USD","properties":{{"plan":"{plan}","interval":"month"{more}}}"#
    )
}
