//! The bytes of a connection. Reads through one buffer a thread, so that an idle connection needs none.

use super::frame::Reader;
use crate::serve::Counted;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

/// What is read in one go.
const READ_BYTES: usize = 16 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that has become a WebSocket.
pub(super) struct Io(Box<dyn Stream>);

impl Io {
    /// Takes the connection from hyper, with what it had read already. What hyper kept around it is given back where it
    /// is a plain connection of our own server; `send_buffer` bounds what the kernel holds for it.
    pub(super) fn new(upgraded: Upgraded, send_buffer: usize, reader: &mut Reader) -> Io {
        match hyper_util::server::conn::auto::upgrade::downcast::<TokioIo<Counted>>(upgraded) {
            Ok(parts) => {
                reader.feed(&parts.read_buf);
                let stream = parts.io.into_inner();
                stream.bound_send_buffer(send_buffer);
                Io(Box::new(stream))
            }
            Err(upgraded) => Io(Box::new(TokioIo::new(upgraded))),
        }
    }

    /// Feeds what came to the reader: how many bytes; 0 at the end.
    pub(super) fn poll_read(&mut self, context: &mut Context<'_>, reader: &mut Reader) -> Poll<io::Result<usize>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut bytes = ReadBuf::new(buffer);
            let read = Pin::new(&mut self.0).poll_read(context, &mut bytes);
            read.map_ok(|()| {
                reader.feed(bytes.filled());
                bytes.filled().len()
            })
        })
    }

    /// Reads and forgets until the end.
    pub(super) async fn drain(&mut self) -> io::Result<()> {
        let mut read = |context: &mut Context<'_>| {
            BUFFER.with_borrow_mut(|buffer| {
                let mut bytes = ReadBuf::new(buffer);
                let read = Pin::new(&mut self.0).poll_read(context, &mut bytes);
                read.map_ok(|()| bytes.filled().len())
            })
        };
        while std::future::poll_fn(&mut read).await? > 0 {}
        Ok(())
    }

    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match slices {
            [one] => Pin::new(&mut self.0).poll_write(context, one),
            many => Pin::new(&mut self.0).poll_write_vectored(context, many),
        }
    }

    /// Sends what the connection itself holds back.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await?;
        self.0.flush().await
    }

    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}
