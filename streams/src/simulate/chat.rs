//! Creators and their fans. Each creator has a live room, busy while the creator is live, and private threads
//! in which chatters answer in the creator's name; fans tip and unlock.

use super::dice::Dice;
use super::{Acts, daily_wave, quoted, seconds, weekday};
use engine::event::Micros;
use std::collections::VecDeque;
use std::fmt::Write;

const STREAM: &str = "chat.messages";
const CREATORS: [&str; 6] = ["luna", "marco", "aiko", "zoe", "rafael", "nia"];
const CHATTERS: [&str; 5] = ["chatter_ana", "chatter_ben", "chatter_cleo", "chatter_dev", "chatter_eli"];
const FANS: usize = 1_500;
/// Private threads of each creator.
const PRIVATE: usize = 40;
/// Messages of a thread that can still be replied to.
const RECENT: usize = 16;

/// Messages a second at normal pace, without the live rooms' bursts.
const PACE: f64 = 19.0;
/// Going live: times a day for each creator, how long (median seconds), and how much busier the room is.
const LIVE_A_DAY: f64 = 9.0;
const LIVE_SECONDS: f64 = 600.0;
const LIVE_FACTOR: f64 = 9.0;

pub(super) struct Chat {
    rooms: Vec<Room>,
    threads: Vec<Thread>,
    /// Generosity of each fan: most tip rarely, a few often.
    fans: Vec<f64>,
    moved: Micros,
}

/// A creator's live room; thread `i` of the same index holds its messages.
struct Room {
    creator: &'static str,
    live_until: Micros,
}

struct Thread {
    name: String,
    /// The one fan of a private thread.
    fan: Option<usize>,
    recent: VecDeque<Message>,
}

#[derive(Clone, Copy)]
struct Message {
    number: u64,
    from_fan: bool,
}

impl Chat {
    pub fn new(dice: &mut Dice, start: Micros) -> Chat {
        let fans = (0..FANS).map(|_| dice.log_normal(1.0, 1.0)).collect();
        let rooms = CREATORS.iter().map(|creator| Room { creator, live_until: start }).collect();
        let thread = |name: String, fan| Thread { name, fan, recent: VecDeque::new() };
        let mut threads: Vec<Thread> = CREATORS.iter().map(|c| thread(format!("{c}-live"), None)).collect();
        for creator in CREATORS {
            for _ in 0..PRIVATE {
                let fan = dice.below(FANS);
                threads.push(thread(format!("{creator}-{}", fan_name(fan)), Some(fan)));
            }
        }
        Chat { rooms, threads, fans, moved: start }
    }

    /// One message, tip or unlock; returns when the next one comes.
    pub fn act(&mut self, at: Micros, dice: &mut Dice, acts: &mut Acts) -> Micros {
        let days = at.since(std::mem::replace(&mut self.moved, at)).0 as f64 / 86_400e6;
        let pace = daily_wave(at, 21.0, 0.3) * if weekday(at) >= 5 { 1.1 } else { 0.95 };
        if dice.chance(LIVE_A_DAY * days * pace * CREATORS.len() as f64) {
            self.go_live(at, dice, acts);
        }
        let live = self.rooms.iter().filter(|room| at < room.live_until).count() as f64;
        // A room is a thirtieth of all messages, times more while its creator is live.
        let busy = 1.0 + live * (LIVE_FACTOR - 1.0) / 30.0;
        let weights = self.rooms.iter().map(|room| if at < room.live_until { LIVE_FACTOR } else { 1.0 });
        let public = weights.clone().sum::<f64>();
        let private = 30.0 - CREATORS.len() as f64;
        if dice.chance(public / (public + private)) {
            let room = dice.weighted(weights);
            self.public_message(room, at, dice, acts);
        } else {
            let thread = self.rooms.len() + dice.below(self.threads.len() - self.rooms.len());
            self.private_message(thread, dice, acts);
        }
        at.plus(seconds(dice.exponential(1.0 / (PACE * pace * busy))))
    }

    fn go_live(&mut self, at: Micros, dice: &mut Dice, acts: &mut Acts) {
        let room = dice.below(self.rooms.len());
        if at < self.rooms[room].live_until {
            return;
        }
        self.rooms[room].live_until = at.plus(seconds(dice.log_normal(LIVE_SECONDS, 0.4)));
        let creator = self.rooms[room].creator;
        let text = say(dice, LIVE_START);
        self.write(room, creator, "creator", &text, None, None, acts);
    }

    fn public_message(&mut self, room: usize, at: Micros, dice: &mut Dice, acts: &mut Acts) {
        let is_live = at < self.rooms[room].live_until;
        if is_live && dice.chance(0.06) {
            let reply_to = self.reply_to(room, true, dice);
            let creator = self.rooms[room].creator;
            return self.write(room, creator, "creator", &say(dice, CREATOR_SAYS), None, reply_to, acts);
        }
        let fan = dice.below(FANS);
        let tip = dice.chance(if is_live { 0.05 } else { 0.015 } * self.fans[fan].min(4.0));
        self.fan_writes(room, fan, tip, if is_live { FAN_IN_LIVE } else { FAN_SAYS }, dice, acts);
    }

    fn private_message(&mut self, thread: usize, dice: &mut Dice, acts: &mut Acts) {
        let waits = self.threads[thread].recent.back().is_some_and(|message| message.from_fan);
        let answers = waits && dice.chance(0.75);
        if answers || dice.chance(0.08) {
            let reply_to = if answers { self.reply_to(thread, true, dice) } else { None };
            let chatter = *dice.pick(&CHATTERS);
            let rules = if dice.chance(0.12) { OFFER } else { CHATTER_SAYS };
            return self.write(thread, chatter, "chatter", &say(dice, rules), None, reply_to, acts);
        }
        let fan = self.threads[thread].fan.expect("a private thread has a fan");
        let tip = dice.chance(0.04 * self.fans[fan].min(4.0));
        self.fan_writes(thread, fan, tip, FAN_SAYS, dice, acts);
    }

    /// A fan's message, or a tip or unlock with its amount.
    fn fan_writes(&mut self, thread: usize, fan: usize, pays: bool, rules: Rules, dice: &mut Dice, acts: &mut Acts) {
        let reply_to = if dice.chance(0.2) { self.reply_to(thread, false, dice) } else { None };
        let (text, amount) = match (pays, dice.chance(0.7)) {
            (false, _) => (say(dice, rules), None),
            // tips are round, unlocks cost what was asked
            (true, true) => (say(dice, TIP), Some(dice.log_normal(8.0, 0.9).ceil().min(500.0))),
            (true, false) => (say(dice, UNLOCK), Some(*dice.pick(&[4.99, 9.99, 14.99, 24.99, 49.99]))),
        };
        self.write(thread, &fan_name(fan), "fan", &text, amount, reply_to, acts);
    }

    /// A recent message of the thread, of a fan if asked; the newest ones most often.
    fn reply_to(&self, thread: usize, of_fan: bool, dice: &mut Dice) -> Option<u64> {
        let recent = &self.threads[thread].recent;
        let candidates = recent.iter().rev().filter(|message| message.from_fan || !of_fan);
        let skip = dice.exponential(1.2) as usize;
        candidates.take(skip + 1).last().map(|message| message.number)
    }

    #[expect(clippy::too_many_arguments, reason = "the columns of a message")]
    fn write(
        &mut self,
        thread: usize,
        sender: &str,
        role: &str,
        text: &str,
        amount: Option<f64>,
        reply_to: Option<u64>,
        acts: &mut Acts,
    ) {
        let thread = &mut self.threads[thread];
        let mut members =
            format!(r#""thread":"{}","sender":"{sender}","role":"{role}","text":{}"#, thread.name, quoted(text));
        let mut add = |part: std::fmt::Arguments<'_>| members.write_fmt(part).expect("text is written to memory");
        if let Some(amount) = amount {
            add(format_args!(r#","amount":{amount:.2},"currency":"USD""#));
        }
        if let Some(reply_to) = reply_to {
            add(format_args!(r#","reply_to":"{}""#, acts.id(reply_to)));
        }
        let number = acts.push(STREAM, members);
        if thread.recent.len() == RECENT {
            thread.recent.pop_front();
        }
        thread.recent.push_back(Message { number, from_fan: role == "fan" });
    }
}

fn fan_name(fan: usize) -> String {
    format!("fan_{fan:04}")
}

/// Sentences with choices: `{name}` stands for one phrase of the list of that name.
type Rules = &'static [&'static str];

const LISTS: [(&str, Rules); 14] = [
    ("hi", &["hey", "hi", "hello", "heyy", "good evening", "hola", "yo", "hi hi"]),
    ("adore", &["love", "adore", "can't get enough of", "am obsessed with", "really like", "keep replaying"]),
    (
        "thing",
        &[
            "that last set",
            "your new photos",
            "the travel vlog",
            "your voice",
            "the behind the scenes clip",
            "this outfit",
            "the workout series",
            "your cooking stream",
            "the cover you sang",
            "that story about Lisbon",
        ],
    ),
    ("praise", &["amazing", "so good", "unreal", "the best", "beautiful", "on fire", "incredible", "my favourite"]),
    ("when", &["tonight", "tomorrow", "this weekend", "on Friday", "later", "next week", "after work"]),
    ("place", &["Berlin", "Manila", "Austin", "São Paulo", "Leeds", "Osaka", "Toronto", "Lyon", "Cape Town"]),
    ("emoji", &["❤️", "🔥", "😍", "😂", "🙌", "✨", "🥹", "💯", "", "", "", ""]),
    (
        "ask",
        &[
            "are you live {when}?",
            "when is the next stream?",
            "do you ever play {game}?",
            "how was your day?",
            "what camera do you use?",
            "did you get my message?",
            "can I get a shoutout?",
            "is there a longer version of {thing}?",
        ],
    ),
    ("game", &["Stardew", "chess", "Elden Ring", "Mario Kart", "Valorant", "Minecraft"]),
    ("mood", &["tired but happy", "super excited", "a bit nervous", "so grateful", "hungry", "full of energy"]),
    ("do", &["editing", "rehearsing", "shooting", "planning the next trip", "answering all of you", "baking"]),
    ("reply", &["haha", "aww", "thank you", "you're sweet", "omg", "good question", "noted", "right?"]),
    ("price", &["5", "10", "15", "25", "50"]),
    ("gift", &["set", "clip", "voice note", "full video", "photo pack", "private stream"]),
];

const FAN_SAYS: Rules = &[
    "{hi} {emoji}",
    "{hi}, {ask}",
    "{ask}",
    "I {adore} {thing} {emoji}",
    "{thing} is {praise} {emoji}",
    "greetings from {place}!",
    "watching from {place} {when}, {ask}",
    "just subscribed, {thing} is {praise}",
    "{thing} or {thing}? I can't decide",
    "missed you {emoji}",
    "lol {emoji}",
    "honestly {thing} made my day",
];
const FAN_IN_LIVE: Rules = &[
    "{emoji}{emoji}{emoji} {praise}",
    "first time here, {hi} from {place}",
    "LET'S GO {emoji}",
    "play {game} next",
    "{ask}",
    "this is {praise}",
    "sound is a bit low?",
    "turn it up {emoji}",
    "{place} is in the house",
    "hahaha {emoji}",
    "who else is here from {place}?",
];
const LIVE_START: Rules = &[
    "going live now, come say hi {emoji}",
    "we're live! feeling {mood} {emoji}",
    "live in 3, 2, 1… {do} with you all {when}",
];
const CREATOR_SAYS: Rules = &[
    "{reply} {emoji}",
    "{hi} everyone, I'm {mood}",
    "{reply}, I'm {do} {when}",
    "shoutout to {place} {emoji}",
    "next up: {game}, then questions",
];
const CHATTER_SAYS: Rules = &[
    "{reply} {emoji} how is {place} today?",
    "{reply}, {do} right now",
    "{hi} you, I'm {mood} {when}",
    "{reply}! which part of {thing} did you like most?",
    "maybe {when} {emoji}",
    "I was just thinking about {thing}, {reply}",
    "tell me more {emoji}",
];
const OFFER: Rules = &[
    "I made a new {gift} just for you, ${price} {emoji}",
    "want the {gift}? it's ${price} until {when}",
    "unlock my {gift} for ${price} and tell me what you think {emoji}",
];
const TIP: Rules = &[
    "for {thing} {emoji}",
    "you deserve it {emoji}",
    "coffee is on me",
    "{praise}!! {emoji}",
    "keep {do} {emoji}",
    "happy birthday {emoji}",
];
const UNLOCK: Rules = &["unlocked the {gift}", "unlocked the {gift}, finally {emoji}", "unlocked: {gift}, {praise}"];

/// One sentence of `rules`, every choice made.
fn say(dice: &mut Dice, rules: Rules) -> String {
    let mut text = String::new();
    let sentence = dice.pick(rules);
    expand(dice, sentence, &mut text);
    text.trim_end().to_owned()
}

fn expand(dice: &mut Dice, pattern: &str, text: &mut String) {
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').expect("a choice in a sentence is closed");
        let (_, phrases) = LISTS.iter().find(|(list, _)| *list == name).expect("a choice in a sentence has a list");
        text.push_str(before);
        let phrase = dice.pick(phrases);
        expand(dice, phrase, text);
        rest = after;
    }
    text.push_str(rest);
}
