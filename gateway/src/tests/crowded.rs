//! More connections than there may be.

use super::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// Whether the server closes a connection on which nothing was said.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut [0])).await;
    !matches!(read, Err(_) | Ok(Ok(1..)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_has_so_many_connections_and_those_that_became_websockets_are_none_of_them() {
    let listening = Listening::start(Limits { http_connections_per_address: 2, ..Limits::default() }).await;
    let mut sockets = Vec::new();
    for _ in 0..4 {
        sockets.push(listening.connect().await);
    }
    let address = listening.url.trim_start_matches("ws://").split('/').next().unwrap().to_owned();
    let mut held = [TcpStream::connect(&address).await.unwrap(), TcpStream::connect(&address).await.unwrap()];
    for stream in &mut held {
        assert!(!is_closed(stream).await);
    }
    assert!(is_closed(&mut TcpStream::connect(&address).await.unwrap()).await, "one too many");
    drop(held);
    for _ in 0..100 {
        if !is_closed(&mut TcpStream::connect(&address).await.unwrap()).await {
            return;
        }
    }
    panic!("no place became free");
}
