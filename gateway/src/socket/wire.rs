//! What is on its way to a client. Its connection's task writes it, and for a plain connection so does whoever has
//! something for many clients: one pass over a thousand sockets costs less than a thousand tasks that are woken.

use super::io::Sink;
use crate::hub::{Cut, Outbox, Taken};
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use std::io::{self, IoSlice};
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Instant;

/// Pieces of shared memory that go into one call.
const SLICES: usize = 64;

/// Bytes that were sent over all WebSockets.
fn count_sent(bytes: usize) {
    static SENT: OnceLock<metrics::Counter> = OnceLock::new();
    SENT.get_or_init(|| metrics::counter!("tidewatch_ws_sent_bytes_total")).increment(bytes as u64);
}

/// The way to a client.
pub(crate) struct Wire(Mutex<Way>);

impl Wire {
    pub(super) fn new(sink: Sink, now: Instant) -> Wire {
        let (writing, at, written) = (Vec::new(), 0, 0);
        Wire(Mutex::new(Way { sink: Some(sink), writing, at, written, took: now, due: None, is_open: false }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Way> {
        self.0.lock()
    }

    /// Writes what waits for the client, as much as goes at once; nothing when the connection's task is to do it.
    pub(crate) fn write(&self, outbox: &Outbox, now: Instant) -> Option<Passed> {
        let mut way = self.0.try_lock()?;
        // where something is left from before, the task waits for the socket already
        if !way.is_open || outbox.is_suspect() || way.is_writing() {
            return None;
        }
        let due = way.due;
        let more = way.take(outbox, now).ok()?;
        match way.write_on(Sink::try_write, now) {
            Poll::Ready(Ok(())) if more => Some(Passed::More),
            Poll::Ready(Ok(())) if way.due == due => Some(Passed::All),
            _ => None, // the task sees the same
        }
    }
}

/// How far somebody came who wrote to a client in passing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Passed {
    All,
    More,
}

/// What is being written, of which the first `written` bytes of `writing[at]` and all before it are gone.
pub(super) struct Way {
    /// None once the connection says goodbye.
    sink: Option<Sink>,
    writing: Vec<Bytes>,
    at: usize,
    written: usize,
    /// When the client took something last, or there was nothing to take.
    pub(super) took: Instant,
    /// When there will be something in the outbox in any case.
    pub(super) due: Option<Instant>,
    /// Whether anything may be taken for the client, by whomever.
    pub(super) is_open: bool,
}

impl Way {
    pub(super) fn is_writing(&self) -> bool {
        self.at < self.writing.len()
    }

    /// Writes until the socket takes no more or nothing waits.
    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, outbox: &Outbox, now: Instant) -> Poll<Stop> {
        loop {
            match self.write_on(|sink, slices| sink.poll_write(context, slices), now) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Stop::Gone),
                Poll::Pending => return outbox.over().map_or(Poll::Pending, |cut| Poll::Ready(Stop::Cut(cut))),
            }
            if !self.is_open {
                return Poll::Pending;
            }
            match self.take(outbox, now) {
                Ok(false) if !self.is_writing() => break,
                Ok(_) => {}
                Err(cut) => return Poll::Ready(Stop::Cut(cut)),
            }
        }
        // of an encrypted connection something may still be on its way
        match self.sink.as_mut().map(|sink| sink.poll_flush(context)) {
            Some(Poll::Ready(Ok(()))) => self.took = now,
            Some(Poll::Ready(Err(_))) | None => return Poll::Ready(Stop::Gone),
            Some(Poll::Pending) => {}
        }
        Poll::Pending
    }

    /// Writes what was taken, until all of it is gone.
    fn write_on(
        &mut self,
        mut write: impl FnMut(&mut Sink, &[IoSlice<'_>]) -> Poll<io::Result<usize>>,
        now: Instant,
    ) -> Poll<io::Result<()>> {
        while self.is_writing() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let rest = &self.writing[self.at..];
            for (slice, bytes) in slices.iter_mut().zip(rest) {
                *slice = IoSlice::new(bytes);
            }
            slices[0] = IoSlice::new(&rest[0][self.written..]);
            let Some(sink) = &mut self.sink else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
            let bytes = match write(sink, &slices[..rest.len().min(SLICES)]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(bytes)) => bytes,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            };
            count_sent(bytes);
            self.took = now;
            self.advance(bytes);
        }
        if self.writing.capacity() > 4 {
            self.writing = Vec::new();
        }
        self.writing.clear();
        self.at = 0;
        Poll::Ready(Ok(()))
    }

    /// Takes what is next, once all that was taken before is written: whether there is more.
    fn take(&mut self, outbox: &Outbox, now: Instant) -> Result<bool, Cut> {
        self.took = now; // all there was
        match outbox.take(now, &mut self.writing) {
            Taken::Cut(cut) => Err(cut),
            Taken::More => {
                self.due = None;
                Ok(true)
            }
            Taken::Until(due) => {
                self.due = due;
                Ok(false)
            }
        }
    }

    fn advance(&mut self, bytes: usize) {
        self.written += bytes;
        while let Some(first) = self.writing.get(self.at).filter(|first| self.written >= first.len()) {
            self.written -= first.len();
            self.at += 1;
        }
    }

    /// Ends it for everybody but who says goodbye: what is not written yet, and of its first piece how many bytes are.
    pub(super) fn close(&mut self) -> Option<(Sink, Vec<Bytes>, usize)> {
        let rest = self.writing.drain(..).skip(std::mem::take(&mut self.at)).collect();
        let written = std::mem::take(&mut self.written);
        self.is_open = false;
        self.sink.take().map(|sink| (sink, rest, written))
    }
}

/// Why nothing more is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    Gone,
    Cut(Cut),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Form;
    use std::sync::Arc;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Semaphore;

    struct Pair {
        wire: Wire,
        outbox: Arc<Outbox>,
        client: TcpStream,
        now: Instant,
    }

    impl Pair {
        async fn new() -> Pair {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (_, half) = listener.accept().await.unwrap().0.into_split();
            socket2::SockRef::from(half.as_ref()).set_send_buffer_size(8 << 10).unwrap();
            half.writable().await.unwrap();
            let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
            let now = Instant::now();
            let wire = Wire::new(Sink::Plain { half, _permit: permit }, now);
            wire.lock().is_open = true;
            Pair { wire, outbox: Outbox::new(64 << 20, Form::Text), client, now }
        }

        fn pass(&self) -> Option<Passed> {
            self.wire.write(&self.outbox, self.now)
        }

        async fn read(&mut self, bytes: usize) -> Vec<u8> {
            let mut read = vec![0; bytes];
            self.client.read_exact(&mut read).await.unwrap();
            read
        }
    }

    #[tokio::test]
    async fn what_waits_is_written_in_passing() {
        let mut pair = Pair::new().await;
        assert_eq!(pair.pass(), Some(Passed::All), "nothing waits");
        pair.outbox.send(Bytes::from_static(b"one "));
        pair.outbox.send(Bytes::from_static(b"two"));
        assert_eq!(pair.pass(), Some(Passed::All));
        assert_eq!(pair.read(7).await, b"one two");
    }

    #[tokio::test]
    async fn nothing_is_written_past_a_task_that_has_rights_to_look_at_or_writes_or_says_goodbye() {
        let mut pair = Pair::new().await;
        pair.outbox.send(Bytes::from_static(b"one"));
        pair.outbox.suspect();
        assert_eq!(pair.pass(), None, "something was taken from the client");
        assert!(pair.outbox.is_to_look());
        pair.wire.lock().is_open = false;
        assert_eq!(pair.pass(), None, "its rights are being looked at");
        pair.wire.lock().is_open = true;
        let held = pair.wire.lock();
        assert_eq!(pair.pass(), None, "its task is at it");
        drop(held);
        assert_eq!(pair.pass(), Some(Passed::All));
        assert_eq!(pair.read(3).await, b"one");
        pair.outbox.send(Bytes::from_static(b"two"));
        let (_sink, rest, _) = pair.wire.lock().close().unwrap();
        assert_eq!((pair.pass(), rest.len()), (None, 0));
        assert!(pair.wire.lock().close().is_none());
    }

    #[tokio::test]
    async fn what_a_full_socket_does_not_take_is_left_to_the_task_and_comes_in_order() {
        let pair = Pair::new().await;
        let text: Vec<u8> = (0..4 << 20).map(|at| (at / 1_000) as u8).collect();
        pair.outbox.send(Bytes::from(text.clone()));
        assert_eq!(pair.pass(), None);
        assert!(pair.wire.lock().is_writing());
        pair.outbox.send(Bytes::from_static(b"end"));
        assert_eq!(pair.pass(), None, "the task waits for the socket already");
        let Pair { wire, outbox, mut client, now } = pair;
        let reading = tokio::spawn(async move {
            let mut read = vec![0; (4 << 20) + 3];
            client.read_exact(&mut read).await.unwrap();
            read
        });
        let writing = std::future::poll_fn(|context| wire.lock().poll_write(context, &outbox, now));
        let read = tokio::select! {
            read = reading => read.unwrap(),
            stopped = writing => panic!("{stopped:?}"),
        };
        assert!(read[..text.len()] == text && &read[text.len()..] == b"end");
    }
}
