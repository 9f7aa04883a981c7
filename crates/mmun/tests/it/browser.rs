//! Chromium without a window, driven through a pipe by its debugging protocol.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

use crate::support::scratch;

/// A browser with one page. The drop ends the browser.
pub(crate) struct Browser {
    child: Child,
    profile: PathBuf,
    to: File,
    from: BufReader<File>,
    session: String,
    next: u64,
    events: Vec<Value>,
}

impl Browser {
    /// Opens a page and waits until it has loaded.
    pub(crate) fn open(page: &Path) -> Browser {
        let profile = scratch("profile");
        // The browser reads from descriptor 3 and writes to 4.
        let (its_input, to) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (from, its_output) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (input, output) = (its_input.as_raw_fd(), its_output.as_raw_fd());
        let mut command = Command::new("chromium");
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]);
        command.arg(format!("--user-data-dir={}", profile.display()));
        command.args(["--remote-debugging-pipe", "about:blank"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let place = move || {
            // SAFETY: `fcntl` takes integers only for this command.
            let copy = |file| unsafe { libc::fcntl(file, libc::F_DUPFD, 10) };
            // SAFETY: `dup2` takes integers, and the new process needs no descriptor at 3 and 4.
            let put = |file, at| unsafe { libc::dup2(file, at) == at };
            // The copies are above 4: neither is overwritten before it is placed.
            let (input, output) = (copy(input), copy(output));
            let placed = put(input, 3) && put(output, 4);
            if placed {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap();
        // Only the browser keeps its ends, so the pipes end with the browser.
        drop((its_input, its_output));
        let (to, from) = (File::from(to), BufReader::new(File::from(from)));
        let mut browser = Browser {
            child,
            profile,
            to,
            from,
            session: String::new(),
            next: 0,
            events: Vec::new(),
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attached = browser.call(
            "Target.attachToTarget",
            json!({"targetId": target["targetId"], "flatten": true}),
        );
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        let screen =
            json!({"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": false});
        browser.call("Emulation.setDeviceMetricsOverride", screen);
        browser.call(
            "Page.navigate",
            json!({"url": format!("file://{}", page.display())}),
        );
        while !browser
            .events
            .iter()
            .any(|event| event["method"] == "Page.loadEventFired")
        {
            let message = browser.message();
            browser.events.push(message);
        }
        browser
    }

    fn message(&mut self) -> Value {
        let mut bytes = Vec::new();
        self.from.read_until(0, &mut bytes).unwrap();
        assert_eq!(bytes.pop(), Some(0), "the browser has ended");
        serde_json::from_slice(&bytes).unwrap()
    }

    /// Calls a method and returns its result.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut request = json!({"id": self.next, "method": method, "params": params});
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        self.to
            .write_all(format!("{request}\0").as_bytes())
            .unwrap();
        loop {
            let message = self.message();
            if message["id"] == self.next {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
            self.events.push(message);
        }
    }

    /// The value of an expression.
    pub(crate) fn eval(&mut self, script: &str) -> Value {
        let result = self.call(
            "Runtime.evaluate",
            json!({"expression": script, "returnByValue": true}),
        );
        assert!(
            result.get("exceptionDetails").is_none(),
            "{script}: {result}"
        );
        result["result"]["value"].clone()
    }

    /// The text of an expression.
    pub(crate) fn text(&mut self, script: &str) -> String {
        self.eval(&format!("String({script})"))
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) fn mouse(&mut self, kind: &str, x: f64, y: f64) {
        let (button, buttons, count) = match kind {
            "mouseMoved" => ("none", 0, 0),
            "dragged" => ("left", 1, 0),
            _ => ("left", 1, 1),
        };
        let kind = if kind == "dragged" {
            "mouseMoved"
        } else {
            kind
        };
        let event = json!({"type": kind, "x": x, "y": y, "button": button, "buttons": buttons, "clickCount": count});
        self.call("Input.dispatchMouseEvent", event);
    }

    /// The box of the element of a selector, scrolled to the middle of the view: left, top, width,
    /// height.
    pub(crate) fn place(&mut self, selector: &str) -> [f64; 4] {
        let script = format!(
            "(() => {{ const node = document.querySelector({selector:?}); node.scrollIntoView({{block: 'center'}}); \
             const box = node.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; }})()"
        );
        let numbers = self.eval(&script);
        [0, 1, 2, 3].map(|at| numbers[at].as_f64().unwrap())
    }

    pub(crate) fn click(&mut self, selector: &str) {
        let [x, y, width, height] = self.place(selector);
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            self.mouse(kind, x + width / 2.0, y + height / 2.0);
        }
    }

    pub(crate) fn key(&mut self, key: &str) {
        let text = if key.len() == 1 { key } else { "" };
        self.call(
            "Input.dispatchKeyEvent",
            json!({"type": "keyDown", "key": key, "text": text}),
        );
        self.call(
            "Input.dispatchKeyEvent",
            json!({"type": "keyUp", "key": key}),
        );
    }

    /// The errors of the page's script, and violations of the page's policy. Other messages differ
    /// between versions of the browser.
    pub(crate) fn complaints(&self) -> Vec<&Value> {
        let is_complaint = |event: &&Value| match event["method"].as_str() {
            Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled") => true,
            Some("Log.entryAdded") => event["params"]["entry"]["text"]
                .as_str()
                .is_some_and(|text| text.contains("Content Security Policy")),
            _ => false,
        };
        self.events.iter().filter(is_complaint).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.profile);
    }
}
