//! What is on its way to a client. Its connection's task writes it, and for a plain connection so does whoever has
//! something for many clients: one pass over a thousand sockets costs less than a thousand tasks that are woken.

use super::io::Sink;
use crate::hub::{Cut, Outbox, Taken, Told};
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

    /// Writes what waits for the client, as much as goes at once, and with it what the subscription `told` has, of which
    /// its outbox does not know yet. `scratch` is empty, and stays so.
    pub(crate) fn write(
        &self,
        outbox: &Outbox,
        told: Option<Told<'_>>,
        now: Instant,
        scratch: &mut Vec<Bytes>,
    ) -> Passed {
        let open = self.0.try_lock().filter(|way| {
            // where something is left from before, the task waits for the socket already
            way.is_open && !outbox.is_suspect() && !way.is_writing()
        });
        let Some(mut way) = open else {
            told.into_iter().for_each(|told| outbox.note(told.id));
            return Passed::Left;
        };
        let due = way.due;
        std::mem::swap(&mut way.writing, scratch); // whose memory is at hand, which that of one client among many is not
        let more = way.take(outbox, told, now);
        let written = way.write_on(Sink::try_write, now);
        if !way.is_writing() {
            std::mem::swap(&mut way.writing, scratch);
        }
        match (more, written) {
            (Ok(true), Poll::Ready(Ok(()))) => Passed::More,
            (Ok(false), Poll::Ready(Ok(()))) if way.due == due => Passed::All,
            _ => Passed::Left, // the task sees the same
        }
    }

    /// Has the memory of [`Wire::write`] fetched.
    pub(crate) fn touch(&self) -> bool {
        self.0.is_locked()
    }
}

/// How far somebody came who wrote to a client in passing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Passed {
    All,
    More,
    /// The connection's task is to do it.
    Left,
}

/// What is being written, of which the first `written` bytes of `writing[at]` and all before it are gone.
#[repr(C)] // what is looked at first is beside the lock
pub(super) struct Way {
    /// Whether anything may be taken for the client, by whomever.
    pub(super) is_open: bool,
    at: usize,
    writing: Vec<Bytes>,
    written: usize,
    /// None once the connection says goodbye.
    sink: Option<Sink>,
    /// When the client took something last, or there was nothing to take.
    pub(super) took: Instant,
    /// When there will be something in the outbox in any case.
    pub(super) due: Option<Instant>,
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
            match self.take(outbox, None, now) {
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
            let rest = &self.writing[self.at..];
            let first = IoSlice::new(&rest[0][self.written..]);
            let Some(sink) = &mut self.sink else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
            let written = if rest.len() == 1 {
                write(sink, &[first])
            } else {
                let mut slices = [first; SLICES];
                for (slice, bytes) in slices.iter_mut().zip(rest).skip(1) {
                    *slice = IoSlice::new(bytes);
                }
                write(sink, &slices[..rest.len().min(SLICES)])
            };
            let bytes = match written {
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
    fn take(&mut self, outbox: &Outbox, told: Option<Told<'_>>, now: Instant) -> Result<bool, Cut> {
        self.took = now; // all there was
        match outbox.take(told, now, &mut self.writing) {
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
pub(crate) mod tests {
    use super::*;
    use crate::hub::Form;
    use std::sync::Arc;
    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Semaphore;

    /// The two ends of a connection.
    pub(crate) struct Pair {
        pub(crate) wire: Wire,
        pub(crate) outbox: Arc<Outbox>,
        pub(crate) client: TcpStream,
        now: Instant,
    }

    impl Pair {
        pub(crate) async fn new() -> Pair {
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

        fn pass(&self) -> Passed {
            self.wire.write(&self.outbox, None, self.now, &mut Vec::new())
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
        assert_eq!(pair.pass(), Passed::All, "nothing waits");
        pair.outbox.send(Bytes::from_static(b"one "));
        pair.outbox.send(Bytes::from_static(b"two"));
        assert_eq!(pair.pass(), Passed::All);
        assert_eq!(pair.read(7).await, b"one two");
    }

    #[tokio::test]
    async fn nothing_is_written_past_a_task_that_has_rights_to_look_at_or_writes_or_says_goodbye() {
        let mut pair = Pair::new().await;
        pair.outbox.send(Bytes::from_static(b"one"));
        pair.outbox.suspect();
        assert_eq!(pair.pass(), Passed::Left, "something was taken from the client");
        assert!(pair.outbox.is_to_look());
        pair.wire.lock().is_open = false;
        assert_eq!(pair.pass(), Passed::Left, "its rights are being looked at");
        pair.wire.lock().is_open = true;
        let held = pair.wire.lock();
        assert_eq!(pair.pass(), Passed::Left, "its task is at it");
        drop(held);
        assert_eq!(pair.pass(), Passed::All);
        assert_eq!(pair.read(3).await, b"one");
        pair.outbox.send(Bytes::from_static(b"two"));
        let (_sink, rest, _) = pair.wire.lock().close().unwrap();
        assert_eq!((pair.pass(), rest.len()), (Passed::Left, 0));
        assert!(pair.wire.lock().close().is_none());
    }

    #[tokio::test]
    async fn what_a_full_socket_does_not_take_is_left_to_the_task_and_comes_in_order() {
        let pair = Pair::new().await;
        let text: Vec<u8> = (0..4 << 20).map(|at| (at / 1_000) as u8).collect();
        pair.outbox.send(Bytes::from(text.clone()));
        assert_eq!(pair.pass(), Passed::Left);
        assert!(pair.wire.lock().is_writing());
        pair.outbox.send(Bytes::from_static(b"end"));
        assert_eq!(pair.pass(), Passed::Left, "the task waits for the socket already");
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
