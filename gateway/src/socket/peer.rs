//! One connection: a single task that reads what the client asks, writes all that waits in one call, and holds the
//! client to its time limits. An idle one has no buffers.

use super::frame::{self, Message, Opcode, Reader, Violation};
use super::io::{Sink, Source};
use super::wire::{Stop, Way, Wire};
use crate::hub::{Cut, Hub, Outbox};
use crate::problem::Problem;
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::MutexGuard;
use serde_json::{Value, json};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::time::{Sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A client has this long to say who it is.
const AUTH_WAIT: Duration = Duration::from_secs(5);
/// How often the server asks whether the client is there, and checks that it still may listen.
const PING_EVERY: Duration = Duration::from_secs(25);
/// A client that says nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A client that takes nothing for this long is gone.
const WRITE_WAIT: Duration = Duration::from_secs(60);
/// A client that is sent away has this long to take what is on its way and the reason.
const CLOSE_WAIT: Duration = Duration::from_secs(20);
/// The same while the server shuts down, and for a client that closes by itself.
const SHORT_CLOSE_WAIT: Duration = Duration::from_secs(3);
/// What is being done for a client while the server shuts down has this long to be answered.
const FINISH_WAIT: Duration = Duration::from_secs(1);
/// A client that broke the protocol has this long to see why it is closed.
const VIOLATION_WAIT: Duration = Duration::from_secs(2);
/// Publications of one connection that wait to be durable; it is read on when one of them is.
const PENDING_MAX: usize = 1_024;
/// Clients of a server that restarts come back over at least this long, and over so much longer for each of them.
const RETURN_SPREAD: Duration = Duration::from_secs(2);
const RETURN_SPREAD_EACH: Duration = Duration::from_micros(500);

/// What is spoken on a connection: requests and channels, or a chat.
pub(crate) trait Talk: Send + 'static {
    /// Whether the client knows what to make of messages that are neither answer nor event.
    const HINTS: bool;

    fn hub(&self) -> &Arc<Hub>;

    /// Cancelled when the server drains.
    fn closing(&self) -> &CancellationToken;

    /// When the client's credentials end, if they do; nothing before it has shown any.
    fn end(&self) -> Option<Option<Instant>>;

    /// The connection ends: nothing more is sent.
    fn leave(&mut self);

    /// Tells the client that a message was refused.
    fn refuse(&self, problem: &Problem);

    /// Checks the token that came with the handshake.
    fn sign_in(&mut self, token: String) -> impl Future<Output = Result<(), Close>> + Send;

    /// Looks again at what the client may have.
    fn check(&mut self) -> impl Future<Output = Result<(), Close>> + Send;

    /// Does what a message asks for; what it gives is answered later.
    fn on_text(&mut self, text: &str) -> impl Future<Output = Result<Option<Pending>, Close>> + Send;
}

/// An answer that comes once something is durable.
pub(crate) type Pending = BoxFuture<'static, Value>;

/// Why the server closes a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Close {
    Unauthenticated,
    Expired,
    /// The client may not have any of it any more.
    Forbidden,
    /// Where the client was cut off.
    TooSlow(String),
    Violation(Violation),
    /// Over which limit the connection would be.
    TooMany(String),
    /// The node that it was for ended it, with this code and reason.
    Ended(u16, String),
    Restart,
    /// The client asked for it, with this code.
    Asked(Option<u16>),
    /// The client is not there any more.
    Gone,
}

impl Close {
    /// Code and reason.
    pub(super) fn frame(&self) -> Option<(u16, String)> {
        Some(match self {
            Close::Unauthenticated => (4001, "not authenticated".into()),
            Close::Expired => (4002, "the token has expired".into()),
            Close::Forbidden => (4003, "not allowed, or not any more".into()),
            Close::TooSlow(why) => (4008, why.clone()),
            Close::Violation(violation) => (violation.code, violation.reason.to_string()),
            Close::TooMany(why) => (1013, why.clone()),
            Close::Ended(code, reason) => (*code, reason.clone()),
            Close::Restart => (1012, "the server restarts".into()),
            Close::Asked(code) => (code.unwrap_or(1000), String::new()),
            Close::Gone => return None,
        })
    }

    /// How long the client has to take what is on its way and the reason.
    fn wait(&self) -> Duration {
        match self {
            Close::Restart | Close::Asked(_) | Close::Gone => SHORT_CLOSE_WAIT,
            Close::Unauthenticated
            | Close::Expired
            | Close::Forbidden
            | Close::TooSlow(_)
            | Close::Violation(_)
            | Close::TooMany(_)
            | Close::Ended(..) => CLOSE_WAIT,
        }
    }
}

/// What is being done for a client. It has the session until it is done.
type Work<T> = Pin<Box<dyn Future<Output = (Box<T>, Result<Option<Pending>, Close>)> + Send>>;

/// Whether it is to be looked at what the client may have; `held`: because something was taken from it, so that it gets
/// nothing before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Check {
    Done,
    Due { held: bool },
    Running { held: bool },
}

pub(super) struct Peer<T> {
    hub: Arc<Hub>,
    source: Source,
    reader: Reader,
    outbox: Arc<Outbox>,
    session: Option<Box<T>>,
    work: Option<Work<T>>,
    check: Check,
    pending: Option<Box<FuturesUnordered<Pending>>>,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    timer: Pin<Box<Sleep>>,
    /// When the client's credentials end, or it should have shown some.
    end: (Option<Instant>, bool),
    heard: Instant,
    ping_at: Instant,
    check_at: Instant,
    /// When the server, which shuts down, waits for nothing any more.
    finish_at: Option<Instant>,
}

impl<T: Talk> Peer<T> {
    /// Serves a client until one side closes.
    pub(super) async fn serve(
        (source, sink): (Source, Sink),
        reader: Reader,
        session: T,
        outbox: Arc<Outbox>,
        token: Option<String>,
    ) {
        let now = Instant::now();
        let hub = session.hub().clone();
        hub.connect(&outbox, Wire::new(sink, now));
        let mut peer = Peer {
            hub,
            source,
            reader,
            outbox,
            closing: Box::pin(session.closing().clone().cancelled_owned()),
            session: Some(Box::new(session)),
            work: None,
            check: Check::Done,
            pending: None,
            timer: Box::pin(sleep_until((now + AUTH_WAIT).into())),
            end: (Some(now + AUTH_WAIT), false),
            heard: now,
            ping_at: now + PING_EVERY,
            check_at: now + PING_EVERY,
            finish_at: None,
        };
        if let Some(token) = token {
            peer.start(|mut session| async move {
                let done = session.sign_in(token).await.map(|()| None);
                (session, done)
            });
        }
        let close = std::future::poll_fn(|context| peer.poll(context)).await;
        // rare and large: not a part of every idle connection
        Box::pin(peer.goodbye(close)).await;
    }

    /// Hands the session to a piece of work. Only when there is none.
    fn start<F>(&mut self, work: impl FnOnce(Box<T>) -> F)
    where
        F: Future<Output = (Box<T>, Result<Option<Pending>, Close>)> + Send + 'static,
    {
        if let Some(session) = self.session.take() {
            self.work = Some(Box::pin(work(session)));
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Close> {
        self.outbox.register(context);
        let now = Instant::now();
        loop {
            self.look_again();
            if let Poll::Ready(close) = self.poll_write(context, now) {
                return Poll::Ready(close);
            }
            let has_worked = match self.poll_work(context) {
                Ok(has_worked) => has_worked,
                Err(close) => return Poll::Ready(close),
            };
            self.look_again(); // before the next request is begun
            let has_read = match self.poll_read(context, now) {
                Ok(has_read) => has_read,
                Err(close) => return Poll::Ready(close),
            };
            if !has_worked && !has_read {
                break;
            }
        }
        self.poll_time(context, now)
    }

    /// Sees whether something was taken from the client: it gets nothing more until that was looked at, which is next
    /// once nothing else is being done for it.
    fn look_again(&mut self) {
        {
            let mut way = way(&self.outbox);
            if self.outbox.is_to_look() {
                (self.check, way.is_open) = (Check::Due { held: true }, false);
            } else if !matches!(self.check, Check::Due { held: true } | Check::Running { held: true }) {
                way.is_open = true;
            }
        }
        if let Check::Due { held } = self.check
            && self.session.is_some()
        {
            self.check = Check::Running { held };
            self.start(|mut session| async move {
                let done = session.check().await.map(|()| None);
                (session, done)
            });
        }
    }

    /// Writes what waits until the socket takes no more or nothing waits.
    fn poll_write(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<Close> {
        way(&self.outbox).poll_write(context, &self.outbox, now).map(|stop| match stop {
            Stop::Gone => Close::Gone,
            Stop::Cut(cut) => cut.into(),
        })
    }

    /// Goes on with what is being done for the client: whether some of it was done.
    fn poll_work(&mut self, context: &mut Context<'_>) -> Result<bool, Close> {
        let mut has_worked = false;
        if let Some(work) = &mut self.work
            && let Poll::Ready((session, done)) = work.as_mut().poll(context)
        {
            self.work = None;
            if matches!(self.check, Check::Running { .. }) {
                self.check = Check::Done;
            }
            has_worked = true;
            if let Some(end) = session.end() {
                self.end = (end, true);
            }
            self.session = Some(session);
            if let Some(pending) = done? {
                self.pending.get_or_insert_default().push(pending);
            }
        }
        if let Some(pending) = &mut self.pending {
            // the first look also fixes the place of what was published: it must come before the next message is read
            while let Poll::Ready(Some(answer)) = pending.poll_next_unpin(context) {
                self.outbox.reply(&answer.to_string());
                has_worked = true;
            }
            if pending.is_empty() {
                self.pending = None;
            }
        }
        Ok(has_worked)
    }

    /// Reads and begins what the next message asks for: whether there was one.
    fn poll_read(&mut self, context: &mut Context<'_>, now: Instant) -> Result<bool, Close> {
        if self.finish_at.is_some() {
            return Ok(false);
        }
        let mut has_read = false;
        while self.work.is_none()
            && self.pending.as_ref().is_none_or(|pending| pending.len() < PENDING_MAX)
            && self.outbox.has_room()
        {
            match self.reader.next().map_err(Close::Violation)? {
                Some(message) => self.on_message(message)?,
                None => match self.source.poll_read(context, &mut self.reader) {
                    Poll::Ready(Ok(0) | Err(_)) => return Err(Close::Gone),
                    Poll::Ready(Ok(_)) => self.heard = now,
                    Poll::Pending => break,
                },
            }
            has_read = true;
        }
        Ok(has_read)
    }

    fn on_message(&mut self, message: Message) -> Result<(), Close> {
        match message {
            Message::Text(text) => self.start(|mut session| async move {
                let done = session.on_text(&text).await;
                (session, done)
            }),
            Message::Binary(bytes) => match self.outbox.form().read(&bytes) {
                Some(Ok(text)) => return self.on_message(Message::Text(text)),
                refused => {
                    let detail = match refused {
                        Some(Err(error)) => format!("this is no MessagePack: {error}"),
                        _ => "send text frames of JSON, or offer the subprotocol tidewatch.v1.msgpack".into(),
                    };
                    if let Some(session) = &self.session {
                        session.refuse(&Problem::invalid("bad_frame", detail));
                    }
                }
            },
            Message::Ping(payload) => {
                let mut pong = BytesMut::new();
                frame::write(&mut pong, Opcode::Pong, &payload);
                self.outbox.send(pong.freeze());
            }
            Message::Pong => {}
            Message::Close(code) => return Err(Close::Asked(code)),
        }
        Ok(())
    }

    /// Looks at the time limits, and sees to it that the task is woken at the next.
    fn poll_time(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<Close> {
        if self.finish_at.is_none() && self.closing.as_mut().poll(context).is_ready() {
            self.finish_at = Some(now + FINISH_WAIT);
        }
        let is_busy = self.work.is_some() || self.pending.is_some();
        loop {
            let now = Instant::now();
            let (took, is_writing, due) = {
                let mut way = way(&self.outbox);
                let due = way.due.filter(|due| *due > now);
                if way.due != due {
                    way.due = None;
                    context.waker().wake_by_ref(); // to take it
                }
                (way.took, way.is_writing(), due)
            };
            if self.finish_at.is_some_and(|at| at <= now || !is_busy) {
                return Poll::Ready(Close::Restart);
            }
            let (end, is_signed_in) = self.end;
            if end.is_some_and(|end| end <= now) {
                return Poll::Ready(if is_signed_in { Close::Expired } else { Close::Unauthenticated });
            }
            let (silent_at, stalled_at) = (self.heard + SILENCE_MAX, took + WRITE_WAIT);
            if silent_at <= now || (is_writing && stalled_at <= now) {
                return Poll::Ready(Close::Gone);
            }
            if self.ping_at <= now {
                self.ping_at = now + PING_EVERY;
                self.outbox.send(Bytes::from_static(&[0x89, 0])); // wakes this task
            }
            if self.check_at <= now {
                self.check_at = now + PING_EVERY;
                if self.check == Check::Done {
                    self.check = Check::Due { held: false };
                    context.waker().wake_by_ref(); // to begin with it
                }
            }
            let mut next = silent_at.min(self.ping_at);
            if is_writing {
                next = next.min(stalled_at);
            }
            for at in [end, due, self.finish_at].into_iter().flatten() {
                next = next.min(at);
            }
            // most things only put the next instant off: then the timer rings too early, and is set again
            if next < self.timer.deadline().into_std() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(next.into());
            }
            if self.timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Tells the client why, and waits until it has closed too.
    async fn goodbye(mut self, close: Close) {
        if let Some(mut session) = self.session.take() {
            session.leave();
        }
        let wait = close.wait();
        // What is being done for it goes on meanwhile: left alone, it would keep from others what it holds of the store.
        let (work, pending) = (self.work.take(), self.pending.take());
        let finish = async {
            if let Some(work) = work {
                let (mut session, _) = work.await;
                session.leave();
            }
            if let Some(pending) = pending {
                pending.map(drop).collect::<()>().await;
            }
        };
        // the client may be gone already, and the work may never end
        _ = tokio::join!(timeout(wait, self.part(&close)), timeout(wait.max(FINISH_WAIT), finish));
    }

    async fn part(&mut self, close: &Close) -> io::Result<()> {
        let Some((mut sink, mut last, written)) = way(&self.outbox).close() else { return Ok(()) };
        let Some((code, reason)) = close.frame() else { return Ok(()) };
        tracing::debug!(code, reason, "closing a WebSocket");
        match close {
            // what waits is dropped, but for the rest of the message that the client has the beginning of
            Close::TooSlow(_) => {
                last.truncate(1);
                if let Some(first) = last.first_mut() {
                    let end = end_of_frame(first, written);
                    first.truncate(end);
                }
            }
            // what was answered last says more than the code: it goes first
            _ => _ = self.outbox.take(None, Instant::now(), &mut last),
        }
        if let Some(first) = last.first_mut() {
            *first = first.slice(written.min(first.len())..);
        }
        let mut end = BytesMut::new();
        if *close == Close::Restart && T::HINTS {
            let spread = RETURN_SPREAD + RETURN_SPREAD_EACH * self.hub.connections();
            let after = spread.mul_f64(rand::random()).as_millis();
            let hint = json!({"type": "reconnect", "after_ms": after as u64}).to_string();
            end.extend_from_slice(&self.outbox.form().frame(&hint));
        }
        frame::write(&mut end, Opcode::Close, &frame::close_payload(code, &reason));
        last.push(end.freeze());
        for bytes in last {
            sink.write_all(&bytes).await?;
        }
        match close {
            Close::Asked(_) => return sink.shutdown().await,
            // the rest of a message is never read: ended at once, the connection would be reset and the reason lost
            Close::Violation(_) => {
                sink.shutdown().await?;
                _ = timeout(VIOLATION_WAIT, self.source.drain()).await;
                return Ok(());
            }
            _ => {}
        }
        // until the client has closed too
        loop {
            match self.reader.next() {
                Ok(Some(Message::Close(_))) | Err(_) => return sink.shutdown().await,
                Ok(Some(_)) => {}
                Ok(None) => {
                    if std::future::poll_fn(|context| self.source.poll_read(context, &mut self.reader)).await? == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }
}

impl<T> Drop for Peer<T> {
    /// However it ends, whoever still has the outbox keeps no connection open.
    fn drop(&mut self) {
        self.outbox.wire().map(|wire| wire.lock().close());
    }
}

/// What is on its way to a client that is being served.
fn way(outbox: &Outbox) -> MutexGuard<'_, Way> {
    outbox.wire().expect("it was connected before it was served").lock()
}

impl From<Cut> for Close {
    fn from(cut: Cut) -> Close {
        match cut {
            Cut::TooSlow(why) => Close::TooSlow(why),
            Cut::Ended(code, reason) => Close::Ended(code, reason),
        }
    }
}

/// Where the frame ends that holds the byte before `written`.
fn end_of_frame(frames: &[u8], written: usize) -> usize {
    let mut end = 0;
    while end < written && end < frames.len() {
        let header = frame::header_bytes(&frames[end..]);
        end += header + frame::payload_bytes(&frames[end..]);
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{History, Limits};
    use crate::hub::Form;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Semaphore;

    #[test]
    fn each_reason_to_close_has_its_code() {
        let slow = Close::TooSlow("too slow for alerts".into());
        let violation = Close::Violation(Violation { code: 1009, reason: "too large".into() });
        let all = [
            Close::Unauthenticated,
            Close::Expired,
            Close::Forbidden,
            slow,
            violation,
            Close::TooMany("too many".into()),
            Close::Restart,
            Close::Asked(Some(3000)),
            Close::Asked(None),
        ];
        let codes = all.map(|close| close.frame().map(|(code, _)| code));
        assert_eq!(codes, [4001, 4002, 4003, 4008, 1009, 1013, 1012, 3000, 1000].map(Some));
        assert_eq!(Close::Gone.frame(), None);
    }

    /// What is spoken with a fault in it.
    struct Faulty(Arc<Hub>, CancellationToken);

    impl Talk for Faulty {
        const HINTS: bool = false;

        fn hub(&self) -> &Arc<Hub> {
            &self.0
        }

        fn closing(&self) -> &CancellationToken {
            &self.1
        }

        fn end(&self) -> Option<Option<Instant>> {
            None
        }

        fn leave(&mut self) {}

        fn refuse(&self, _: &Problem) {}

        async fn sign_in(&mut self, _: String) -> Result<(), Close> {
            Ok(())
        }

        async fn check(&mut self) -> Result<(), Close> {
            Ok(())
        }

        async fn on_text(&mut self, text: &str) -> Result<Option<Pending>, Close> {
            panic!("a fault that `{text}` shows")
        }
    }

    #[tokio::test]
    async fn a_connection_whose_task_fails_is_closed_whoever_still_has_its_outbox() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (read, half) = listener.accept().await.unwrap().0.into_split();
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let outbox = Outbox::new(1 << 20, Form::Text);
        let talk = Faulty(Hub::new(&Limits::default(), &History::default()), CancellationToken::new());
        let io = (Source::Plain(read), Sink::Plain { half, _permit: permit });
        let served = tokio::spawn(Peer::serve(io, Reader::new(1 << 20, false), talk, outbox.clone(), None));
        client.write_all(&[0x81, 0x81, 0, 0, 0, 0, b'x']).await.unwrap();
        assert!(served.await.unwrap_err().is_panic());
        let ended = timeout(Duration::from_secs(5), client.read(&mut [0; 16])).await.expect("it is closed");
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        drop(outbox);
    }

    #[test]
    fn a_message_that_was_begun_is_written_to_its_end() {
        let mut frames = BytesMut::new();
        for bytes in [3, 200, 70_000] {
            frame::write(&mut frames, Opcode::Text, &vec![b'x'; bytes]);
        }
        let ends = [5, 5 + 204, 5 + 204 + 70_010];
        for (written, end) in [(0, 0), (1, ends[0]), (5, ends[0]), (6, ends[1]), (209, ends[1]), (210, ends[2])] {
            assert_eq!(end_of_frame(&frames, written), end, "{written}");
        }
    }
}
