//! The bytes of a connection, each way by itself: so that who has something for a client may write it at once. Reads
//! through one buffer a thread, so that an idle connection needs none.

use super::frame::Reader;
use crate::serve::Counted;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use std::cell::RefCell;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::OwnedSemaphorePermit;

/// What is read in one go.
const READ_BYTES: usize = 16 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Takes a connection that has become a WebSocket from hyper, with what was read already. What hyper kept around it is
/// given back where it is a connection of our own server; `send_buffer` bounds what the kernel holds for it.
pub(super) fn split(upgraded: Upgraded, send_buffer: usize, reader: &mut Reader) -> (Source, Sink) {
    let other: Box<dyn Stream> = match hyper_util::server::conn::auto::upgrade::downcast::<TokioIo<Counted>>(upgraded) {
        Ok(parts) => {
            reader.feed(&parts.read_buf);
            let stream = parts.io.into_inner().upgraded();
            stream.bound_send_buffer(send_buffer);
            match stream.into_plain() {
                Ok((stream, permit)) => {
                    let (read, write) = stream.into_split();
                    return (Source::Plain(read), Sink::Plain { half: write, _permit: permit });
                }
                Err(encrypted) => encrypted,
            }
        }
        Err(upgraded) => Box::new(TokioIo::new(upgraded)),
    };
    let (read, write) = tokio::io::split(other);
    (Source::Other(read), Sink::Other(write))
}

/// What the client sends.
pub(super) enum Source {
    Plain(OwnedReadHalf),
    Other(ReadHalf<Box<dyn Stream>>),
}

impl Source {
    /// Feeds what came to the reader: how many bytes; 0 at the end.
    pub(super) fn poll_read(&mut self, context: &mut Context<'_>, reader: &mut Reader) -> Poll<io::Result<usize>> {
        self.poll_bytes(context, |bytes| {
            reader.feed(bytes);
            bytes.len()
        })
    }

    /// Reads and forgets until the end.
    pub(super) async fn drain(&mut self) -> io::Result<()> {
        while std::future::poll_fn(|context| self.poll_bytes(context, <[u8]>::len)).await? > 0 {}
        Ok(())
    }

    fn poll_bytes(&mut self, context: &mut Context<'_>, take: impl FnOnce(&[u8]) -> usize) -> Poll<io::Result<usize>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut bytes = ReadBuf::new(buffer);
            ready!(match self {
                Source::Plain(half) => Pin::new(half).poll_read(context, &mut bytes),
                Source::Other(half) => Pin::new(half).poll_read(context, &mut bytes),
            })?;
            Poll::Ready(Ok(take(bytes.filled())))
        })
    }
}

/// What the client gets. A plain connection counts as one for as long as this lives.
pub(super) enum Sink {
    Plain { half: OwnedWriteHalf, _permit: OwnedSemaphorePermit },
    Other(WriteHalf<Box<dyn Stream>>),
}

impl Sink {
    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match (self, slices) {
            (Sink::Plain { half, .. }, [one]) => Pin::new(half).poll_write(context, one),
            (Sink::Plain { half, .. }, many) => Pin::new(half).poll_write_vectored(context, many),
            (Sink::Other(half), [one]) => Pin::new(half).poll_write(context, one),
            (Sink::Other(half), many) => Pin::new(half).poll_write_vectored(context, many),
        }
    }

    /// Writes what goes at once, by whoever calls; nothing goes where only the connection's task can write.
    pub(super) fn try_write(&mut self, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Sink::Plain { half, .. } = self else { return Poll::Pending };
        let written = match slices {
            // what tokio believes of the socket needs not be read: where it is full, the task finds it so
            [one] => SockRef::from(half.as_ref()).send(one),
            many => half.try_write_vectored(many),
        };
        match written {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Poll::Pending,
            done => Poll::Ready(done),
        }
    }

    /// Sends what the connection itself holds back.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Sink::Plain { half, .. } => Pin::new(half).poll_flush(context),
            Sink::Other(half) => Pin::new(half).poll_flush(context),
        }
    }

    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Plain { half, .. } => half.write_all(bytes).await,
            Sink::Other(half) => {
                half.write_all(bytes).await?;
                half.flush().await
            }
        }
    }

    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Sink::Plain { half, .. } => half.shutdown().await,
            Sink::Other(half) => half.shutdown().await,
        }
    }
}
