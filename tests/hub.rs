//! Models from a hub: a small server of the test's own on the loopback interface.
#![cfg(feature = "hub")]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use energyflow::Error;
use energyflow::text::hub::{HubOptions, fetch_with};
use sha2::{Digest, Sha256};

const MODEL: &str = "owner/tiny-model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

/// What the server does wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// So many answers with weights end in the middle.
    interruptions: usize,
    /// So many answers with weights have a wrong byte.
    damages: usize,
}

struct Server {
    endpoint: String,
    log: Arc<Mutex<Vec<String>>>,
}

fn weights() -> Vec<u8> {
    (0..300_000_u32)
        .map(|i| (i.wrapping_mul(i) % 251) as u8)
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Server {
    fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (requests, address) = (Arc::clone(&log), endpoint.clone());
        let faults = Arc::new(Mutex::new(faults));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, address) = (Arc::clone(&requests), address.clone());
                let faults = Arc::clone(&faults);
                std::thread::spawn(move || serve(stream, &address, &requests, &faults));
            }
        });
        Self { endpoint, log }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions::default()
            .endpoint(Some(self.endpoint.clone()))
            .cache(Some(cache.to_owned()))
    }

    /// Requests for the bytes of the weights, with their ranges.
    fn fetched(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        let of_weights = log.iter().filter(|line| line.contains("/store/"));
        of_weights
            .filter(|line| !line.ends_with("bytes=0-0"))
            .cloned()
            .collect()
    }
}

fn serve(
    stream: TcpStream,
    address: &str,
    log: &Mutex<Vec<String>>,
    faults: &Mutex<Faults>,
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let path = line.split(' ').nth(1)?.to_owned();
        let mut range = String::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("range:") {
                range = value.trim().to_owned();
            }
        }
        log.lock().unwrap().push(format!("{path} {range}"));
        let small: HashMap<&str, &str> = [
            ("config.json", "{\"model_type\": \"bert\"}"),
            ("modules.json", "[]"),
            ("1_Pooling/config.json", "{}"),
            ("tokenizer.json", "{}"),
        ]
        .into();
        let mut end = false;
        let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
        let prefix = format!("/{MODEL}/resolve/main/");
        if path == format!("/api/models/{MODEL}/revision/main") {
            let names =
                small
                    .keys()
                    .copied()
                    .chain([WEIGHTS, "pytorch_model.bin", "../evil/config.json"]);
            let names = names.map(|name| format!("{{\"rfilename\": {name:?}}}"));
            let names = names.collect::<Vec<_>>().join(", ");
            let body = format!("{{\"siblings\": [{names}], \"sha\": \"{COMMIT}\"}}");
            answer(
                &mut stream,
                "200 OK",
                "Content-Type: application/json\r\n",
                body.as_bytes(),
            )?;
        } else if path == format!("{prefix}{WEIGHTS}") {
            let tag = hex(&Sha256::digest(weights()));
            let headers =
                format!("{commit}X-Linked-Etag: \"{tag}\"\r\nLocation: {address}/store/{tag}\r\n");
            answer(&mut stream, "302 Found", &headers, b"")?;
        } else if path.starts_with("/store/") {
            let mut bytes = weights();
            let mut faults = faults.lock().unwrap();
            if range != "bytes=0-0" && faults.interruptions > 0 {
                faults.interruptions -= 1;
                end = true;
            } else if range != "bytes=0-0" && faults.damages > 0 {
                faults.damages -= 1;
                bytes[200_000] ^= 1;
            }
            drop(faults);
            part(&mut stream, &range, "", &bytes, end)?;
        } else if let Some(body) = path.strip_prefix(&prefix).and_then(|name| small.get(name)) {
            let headers = format!(
                "{commit}ETag: \"{}\"\r\n",
                &hex(&Sha256::digest(path.as_bytes()))[..40]
            );
            part(&mut stream, &range, &headers, body.as_bytes(), false)?;
        } else {
            answer(&mut stream, "404 Not Found", "", b"")?;
        }
        if end {
            return None;
        }
    }
}

fn answer(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> Option<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()
}

/// The bytes that a range asks for; only the first half of them, if the answer is interrupted.
fn part(
    stream: &mut TcpStream,
    range: &str,
    headers: &str,
    bytes: &[u8],
    interrupted: bool,
) -> Option<()> {
    let range = range.strip_prefix("bytes=").unwrap_or("0-");
    let (from, to) = range.split_once('-')?;
    let from: usize = from.parse().ok()?;
    let to = to.parse().map_or(bytes.len(), |to: usize| to + 1);
    if from >= bytes.len() {
        return answer(stream, "416 Range Not Satisfiable", "", b"");
    }
    let wanted = &bytes[from..to];
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\n{headers}Content-Range: bytes {from}-{}/{}\r\nContent-Length: {}\r\n\r\n",
        to - 1,
        bytes.len(),
        wanted.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    let sent = if interrupted {
        wanted.len() / 2
    } else {
        wanted.len()
    };
    stream.write_all(&wanted[..sent]).ok()?;
    if interrupted {
        stream.shutdown(std::net::Shutdown::Both).ok()?;
    }
    Some(())
}

fn check(folder: &Path) {
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
    assert!(folder.join("config.json").exists());
    assert!(folder.join("1_Pooling/config.json").exists());
    assert!(!folder.join("pytorch_model.bin").exists());
}

#[test]
fn a_model_is_fetched_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults::default());
    let folder = fetch_with(MODEL, &server.options(cache.path())).unwrap();
    check(&folder);
    assert_eq!(server.fetched().len(), 1);
    assert!(!cache.path().join("evil").exists());
    // From the cache, without a network.
    let nowhere = HubOptions::default()
        .cache(Some(cache.path().to_owned()))
        .endpoint(Some("http://127.0.0.1:9".into()));
    assert_eq!(fetch_with(MODEL, &nowhere).unwrap(), folder);
}

#[test]
fn an_interrupted_download_goes_on() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults {
        interruptions: 1,
        damages: 0,
    });
    // In the same call.
    let folder = fetch_with(MODEL, &server.options(cache.path())).unwrap();
    check(&folder);
    let fetched = server.fetched();
    assert_eq!(fetched.len(), 2, "{fetched:?}");
    assert!(fetched[0].ends_with("bytes=0-"), "{fetched:?}");
    assert!(fetched[1].ends_with("bytes=150000-"), "{fetched:?}");

    // In a later call.
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults {
        interruptions: 1,
        damages: 0,
    });
    let options = server.options(cache.path()).retries(0);
    let error = fetch_with(MODEL, &options).unwrap_err();
    assert!(matches!(error, Error::Download { .. }), "{error:?}");
    check(&fetch_with(MODEL, &options).unwrap());
    assert!(server.fetched()[1].ends_with("bytes=150000-"));
}

#[test]
fn a_damaged_file_is_fetched_again() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults {
        interruptions: 0,
        damages: 1,
    });
    let folder = fetch_with(MODEL, &server.options(cache.path())).unwrap();
    check(&folder);
    assert_eq!(server.fetched().len(), 2);

    // A file that was damaged on the disk.
    let blob = fs::canonicalize(folder.join(WEIGHTS)).unwrap();
    let mut bytes = weights();
    bytes[7] ^= 1;
    fs::write(&blob, bytes).unwrap();
    check(&fetch_with(MODEL, &server.options(cache.path())).unwrap());
    assert_eq!(server.fetched().len(), 3);

    // One that stays damaged is refused, and not kept.
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults {
        interruptions: 0,
        damages: 2,
    });
    let options = server.options(cache.path());
    let error = fetch_with(MODEL, &options).unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    check(&fetch_with(MODEL, &options).unwrap());
}

#[test]
fn what_cannot_be_fetched_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(Faults::default());
    let options = server.options(cache.path());
    let error = fetch_with("owner/other", &options).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Download { .. }), "{error:?}");
    assert!(
        text.contains("owner/other") && text.contains("404"),
        "{text}"
    );
    for name in ["", "a/b/c", "../x", "a//b", "a b", "/etc"] {
        let error = fetch_with(name, &options).unwrap_err();
        assert!(
            matches!(error, Error::Config { field: "model", .. }),
            "{name:?}: {error:?}"
        );
    }
    let nowhere = options.endpoint(Some("http://127.0.0.1:9".into()));
    let error = fetch_with(MODEL, &nowhere).unwrap_err();
    assert!(matches!(error, Error::Download { .. }), "{error:?}");
}
