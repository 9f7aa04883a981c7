//! The page of a report, in a browser.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Output;

use serde_json::json;
use testkit::{Cap, require};

use crate::browser::Browser;
use crate::support::{by_default, scratch, text, trace, within};

/// A trace of two processes. The first unmaps 1 MiB of 16 MiB `count` times: twice in one function,
/// then once in another, and so on. The second process clears a page.
fn recorded(count: u64) -> String {
    const NAME: &str = "</script><script>pwned=1</script>";
    let mut out = String::new();
    let mut put = |line: serde_json::Value| writeln!(out, "{line}").unwrap();
    for mm in [1, 2] {
        put(
            json!({"v": 1, "t": mm, "kind": "mm_new", "pid": 40 + mm, "tid": 40 + mm, "mm": mm, "comm": NAME,
            "program": format!("/bin/{NAME}{mm}")}),
        );
    }
    let mut change = |t: u64, mm: u64, event: &str, cause: &str, at: u64, pages: u64, site: u64| {
        let (start, end) = (at << 12, (at + pages) << 12);
        let span = |kind, t: u64| {
            json!({"v": 1, "t": t, "kind": kind, "pid": 40 + mm, "tid": 40 + mm, "mm": mm, "event": event,
                "cause": cause, "start": format!("{start:#x}"), "end": format!("{end:#x}"), "blockable": true,
                "comm": NAME})
        };
        let (mut begin, mut done) = (span("start", t), span("end", t + 400));
        begin["what"] = if mm == 1 {
            json!("anonymous")
        } else {
            json!("/tmp/<b>\"&'.so")
        };
        for (key, bytes) in [
            ("resident", 8192),
            ("file", 0),
            ("huge", 0),
            ("swapped", 0),
            ("site", site),
        ] {
            begin[key] = bytes.into();
        }
        done["result"] = 0.into();
        done["self"] = (100 + site).into();
        put(begin);
        put(done);
    };
    for at in 0..count {
        change(
            1000 * (at + 1),
            1,
            "unmap",
            "munmap",
            0x1000 + 256 * (at % 16),
            256,
            at % 3 / 2,
        );
    }
    change(1000 * (count + 1), 2, "clear", "madvise", 0x50, 1, 2);
    let frame = |function: &str| json!({"function": function, "module": "app", "line": "a.c:7", "named": true});
    for (site, function) in ["often", "seldom", "<img src=x onerror=pwned=1>"]
        .iter()
        .enumerate()
    {
        put(
            json!({"v": 1, "t": 1000 * (count + 9), "kind": "stack", "site": site, "place": 1,
            "frames": [frame("munmap"), frame(function), frame("main")]}),
        );
    }
    out
}

/// Makes the page of a trace.
fn page(trace: &str) -> PathBuf {
    let (path, page) = (scratch("page.jsonl"), scratch("page.html"));
    fs::write(&path, trace).unwrap();
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    command.args(["report", "-o"]).arg(&page).arg(&path);
    let output = within("mmun report", move || command.output().unwrap());
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        text(&output.stderr)
    );
    fs::remove_file(path).unwrap();
    page
}

#[test]
fn a_page_is_hovered_sorted_zoomed_and_searched() {
    if !require(Cap::Program("chromium")) {
        return;
    }
    let page = page(&recorded(9));
    within("the browser", {
        let page = page.clone();
        move || {
            let mut browser = Browser::open(&page);
            hostile_names_are_text(&mut browser);
            changes_are_shown(&mut browser);
            places_are_sorted(&mut browser);
            stacks_are_searched(&mut browser);
            everything_has_a_name(&mut browser);
            a_narrow_window_holds_everything(&mut browser);
            dark_and_paper(&mut browser);
            assert!(
                browser.complaints().is_empty(),
                "{:?}",
                browser.complaints()
            );
        }
    });
    fs::remove_file(page).unwrap();
}

fn hostile_names_are_text(browser: &mut Browser) {
    assert_eq!(browser.text("typeof pwned"), "undefined");
    assert_eq!(
        browser.text("document.scripts.length + ' ' + document.querySelectorAll('img, b').length"),
        "2 0"
    );
    assert_eq!(
        browser.text("document.title"),
        "mmun: script>1",
        "the last part of the path"
    );
    assert!(
        browser
            .text("document.querySelector('#sites').textContent")
            .contains("<img src=x onerror=pwned=1>")
    );
    assert!(
        browser
            .text("document.querySelector('#tiles').textContent")
            .contains("translations10")
    );
}

/// Hovers over a change of the picture, selects changes with the mouse, and uses the keyboard. The
/// left 176 pixels of the picture are labels.
fn changes_are_shown(browser: &mut Browser) {
    const NOTE: &str = "document.querySelector('#map-note').textContent";
    assert_eq!(browser.text(NOTE), "9 changes in view.");
    let [x, y, width, height] = browser.place("#map");
    let at = |part: f64| x + 176.0 + part * (width - 184.0);
    // The address space exists from 1 ns to the end, and its fifth change begins at 5000 ns.
    let span = 18_000.0 - 1.0;
    let middle = y + 54.0 + (height - 74.0) * (4.5 / 9.0);
    browser.mouse("mouseMoved", at(4999.0 / span), middle);
    let tip = browser.text(
        "document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').textContent",
    );
    for part in [
        "munmap = 0   unmap",
        "range 1.0 MiB, resident 8.0 KiB",
        "time 100 ns in the call",
        "* often (app a.c:7)",
    ] {
        assert!(tip.contains(part), "{part} in {tip:?}");
    }
    browser.mouse("mouseMoved", x + 300.0, y + 30.0);
    assert_eq!(
        browser.text("document.querySelector('#tip').hidden"),
        "true"
    );
    // Select two changes with the mouse, show all again, then use the keyboard.
    browser.mouse("mousePressed", at(2500.0 / span), middle);
    browser.mouse("dragged", at(3500.0 / span), middle + 3.0);
    browser.mouse("dragged", at(4500.0 / span), middle + 3.0);
    browser.mouse("mouseReleased", at(4500.0 / span), middle + 3.0);
    assert_eq!(browser.text(NOTE), "2 changes in view.");
    browser.click("#zoom-all");
    assert_eq!(browser.text(NOTE), "9 changes in view.");
    browser.eval("document.querySelector('#map').focus()");
    browser.key("+");
    assert_ne!(browser.text(NOTE), "9 changes in view.");
    browser.key("0");
    browser.key("n");
    assert!(
        browser
            .text("document.querySelector('#say').textContent")
            .starts_with("munmap = 0")
    );
    let choose = "(() => { const lane = document.querySelector('#lane'); lane.value = 1; \
                  lane.dispatchEvent(new Event('change')); return lane.selectedOptions[0].textContent; })()";
    assert!(browser.text(choose).contains("process 42"));
    assert_eq!(browser.text(NOTE), "1 change in view.");
    browser.eval(
        "document.querySelector('#lane').value = 0; document.querySelector('#lane').dispatchEvent(new Event('change'))",
    );
}

fn places_are_sorted(browser: &mut Browser) {
    const FIRST: &str =
        "document.querySelector('#sites tbody tr td:last-child button').textContent";
    const SORTED: &str = "[...document.querySelectorAll('#sites th[aria-sort]')].map(th => th.textContent + th.ariaSort).join()";
    assert_eq!(
        (browser.text(SORTED).as_str(), browser.text(FIRST).as_str()),
        ("timedescending", "often (app a.c:7)")
    );
    browser.click("#sites th:last-child button");
    assert_eq!(browser.text(SORTED), "whereascending");
    assert!(browser.text(FIRST).starts_with("<img"));
    browser.click("#sites th:first-child button");
    assert_eq!(
        (browser.text(SORTED).as_str(), browser.text(FIRST).as_str()),
        ("callsdescending", "often (app a.c:7)")
    );
    browser.click("#sites th:first-child button");
    assert_eq!(browser.text(SORTED), "callsascending");
    browser.click("#sites-find");
    browser.call("Input.insertText", json!({"text": "SELD"}));
    assert_eq!(
        browser.text("document.querySelectorAll('#sites tbody tr').length"),
        "1"
    );
    browser.click("#sites tbody button");
    assert_eq!(
        browser.text("document.querySelector('#map-note').textContent"),
        "3 changes in view."
    );
    browser.click("#mark-filter button");
    assert_eq!(
        browser.text("document.querySelector('#map-note').textContent"),
        "9 changes in view."
    );
}

fn stacks_are_searched(browser: &mut Browser) {
    const FRAMES: &str =
        "[...document.querySelectorAll('#flame text')].map(text => text.textContent).join()";
    for (kind, share) in [("resident", "30 %"), ("calls", "30 %"), ("time", "30 %")] {
        browser.click(&format!("#flame-by input[value={kind}]"));
        browser.eval("document.querySelector('#flame-find').value = ''");
        browser.click("#flame-find");
        browser.call("Input.insertText", json!({"text": "seldom"}));
        let found = browser.text("document.querySelector('#flame-found').textContent");
        assert!(
            found.starts_with(&format!("found in {share}")),
            "{kind}: {found}"
        );
        assert_eq!(
            browser.text("document.querySelectorAll('#flame .found').length"),
            "1"
        );
    }
    assert!(browser.text(FRAMES).contains("often (app)"));
    browser.click("#flame .found rect");
    assert!(
        !browser.text(FRAMES).contains("often (app)"),
        "only what is below"
    );
    browser.click("#flame-all");
    browser.eval("document.querySelector('#flame').focus()");
    browser.key("ArrowDown");
    assert!(
        browser
            .text("document.querySelector('#say').textContent")
            .starts_with("main (app)")
    );
}

fn everything_has_a_name(browser: &mut Browser) {
    const ROLES: [&str; 9] = [
        "button",
        "radio",
        "searchbox",
        "textbox",
        "combobox",
        "application",
        "image",
        "link",
        "group",
    ];
    let tree = browser.call("Accessibility.getFullAXTree", json!({}));
    let nodes = tree["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| node["ignored"] == false);
    let mut count = 0;
    for node in nodes.filter(|node| ROLES.iter().any(|role| node["role"]["value"] == *role)) {
        assert!(
            node["name"]["value"]
                .as_str()
                .is_some_and(|name| !name.is_empty()),
            "without a name: {node}"
        );
        count += 1;
    }
    assert!(count > 15, "{count} things to use");
}

fn a_narrow_window_holds_everything(browser: &mut Browser) {
    let screen =
        |width| json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
    browser.call("Emulation.setDeviceMetricsOverride", screen(400));
    assert_eq!(
        browser.text("document.documentElement.scrollWidth <= 400"),
        "true"
    );
    let height = "document.querySelector('#sites tbody tr').getBoundingClientRect().height";
    let height: f64 = browser.text(height).parse().unwrap();
    assert!(height < 120.0, "a row of the table is {height} high");
    browser.call("Emulation.setDeviceMetricsOverride", screen(1400));
}

fn dark_and_paper(browser: &mut Browser) {
    const BACK: &str = "getComputedStyle(document.body).backgroundColor";
    let light = browser.text(BACK);
    let dark = json!({"features": [{"name": "prefers-color-scheme", "value": "dark"}]});
    browser.call("Emulation.setEmulatedMedia", dark);
    assert_ne!(browser.text(BACK), light);
    let paper = json!({"media": "print", "features": []});
    browser.call("Emulation.setEmulatedMedia", paper);
    // Controls are of no use on paper. The rest is there, and no wider than the sheet.
    const SHOWN: &str =
        "[...document.querySelectorAll('WHAT')].filter(e => e.getClientRects().length).length";
    let shown = |browser: &mut Browser, what| browser.text(&SHOWN.replace("WHAT", what));
    assert_eq!(shown(browser, ".tools button, input, #tip"), "0");
    assert_ne!(shown(browser, "#sites tbody tr"), "0");
    assert_ne!(shown(browser, "canvas, svg"), "0");
    let fits = "document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.text(fits), "true");
    let pdf = browser.call("Page.printToPDF", json!({}));
    assert!(pdf["data"].as_str().unwrap().len() > 10_000);
    let screen = json!({"media": "", "features": []});
    browser.call("Emulation.setEmulatedMedia", screen);
    assert_ne!(shown(browser, ".tools button"), "0");
}

#[test]
fn a_large_trace_makes_a_small_page_that_names_its_omissions() {
    if !require(Cap::Program("chromium")) {
        return;
    }
    let page = page(&recorded(40_000));
    assert!(fs::metadata(&page).unwrap().len() < 10_000_000);
    within("the browser", {
        let page = page.clone();
        move || {
            let mut browser = Browser::open(&page);
            let note = browser.text("document.querySelector('#map-note').textContent");
            assert!(
                note.contains("as density") && note.contains("lighter ones are the haze"),
                "{note}"
            );
            let key = browser.text("document.querySelector('#map-key').textContent");
            assert!(key.contains("haze: lighter changes"), "{key}");
            assert!(
                browser
                    .text("document.querySelector('#tiles').textContent")
                    .contains("40,001")
            );
            let notes = browser.text("document.querySelector('#notes').textContent");
            assert!(
                notes.contains("lighter changes are not shown one by one"),
                "{notes}"
            );
            assert!(
                browser.complaints().is_empty(),
                "{:?}",
                browser.complaints()
            );
        }
    });
    fs::remove_file(page).unwrap();
}

/// `mmun trace ARGS -- ls /`, with these environment variables.
fn traced(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = trace();
    command
        .args(args)
        .args(["--", "ls", "/"])
        .envs(environment.iter().copied());
    within("mmun trace", move || command.output().unwrap())
}

#[test]
fn a_trace_makes_its_page_at_the_end() {
    let page = scratch("ls.html");
    let output = traced(&["--report", page.to_str().unwrap()], &[]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        text(&output.stderr)
    );
    let text = fs::read_to_string(&page).unwrap();
    fs::remove_file(page).unwrap();
    let (_, data) = text.split_once("id=\"data\">").unwrap();
    let (data, _) = data.split_once("</script>").unwrap();
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    assert!(data["has_stacks"] == true && data["has_births"] == true && data["is_own"] == true);
    assert!(data["lanes"][0]["lives"].as_array().unwrap().len() > 5 && data["title"] == "ls");
}

#[test]
fn a_page_that_cannot_be_written_loses_no_record() {
    let folder = scratch("spool");
    fs::create_dir(&folder).unwrap();
    let output = traced(
        &["--report", "/dev/full"],
        &[("TMPDIR", folder.to_str().unwrap())],
    );
    let line = text(&output.stderr);
    assert_eq!(
        (output.status.code(), line.lines().count()),
        (Some(125), 1),
        "{line}"
    );
    assert!(
        line.contains("write on /dev/full: No space left on device"),
        "{line}"
    );
    let spool = line
        .split(' ')
        .find(|word| word.starts_with(folder.to_str().unwrap()))
        .unwrap()
        .trim_matches('\'');
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    let page = scratch("after.html");
    command.args(["report", "-o"]).arg(&page).arg(spool);
    assert!(command.status().unwrap().success());
    assert!(fs::metadata(&page).unwrap().len() > 10_000);
    fs::remove_file(page).unwrap();
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_page_that_cannot_be_made_is_reported_before_the_program_starts() {
    let nowhere = scratch("nowhere");
    let page = scratch("never.html");
    for (args, environment) in [
        (["--report", "/nowhere/page.html"], None),
        (
            ["--report", page.to_str().unwrap()],
            Some(("TMPDIR", nowhere.to_str().unwrap())),
        ),
    ] {
        let output = traced(&args, environment.as_slice());
        assert_eq!(
            (output.status.code(), text(&output.stderr).lines().count()),
            (Some(125), 1)
        );
        assert!(output.stdout.is_empty(), "the program has not run");
    }
    let output = {
        let mut command = trace();
        command.arg("--report").arg(&page).arg("/no/such/program");
        within("mmun trace", move || command.output().unwrap())
    };
    assert_eq!(output.status.code(), Some(127));
    assert!(!page.exists(), "there was nothing to tell");
}

#[test]
fn a_spool_that_gets_full_ends_the_trace_and_not_the_program() {
    let (page, folder) = (scratch("cut.html"), scratch("cut-spool"));
    fs::create_dir(&folder).unwrap();
    // Each `exec` of the shell's child makes some forty records. The limit is 200 KiB for one file;
    // the page is smaller.
    let script = "trap '' XFSZ; ulimit -f 400; exec \"$0\" trace --report \"$1\" -- sh -c '\
         i=0; while [ $i -lt 150 ]; do /bin/true; i=$((i+1)); done; echo alive'";
    let mut command = by_default("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_mmun")])
        .arg(&page)
        .env("TMPDIR", &folder);
    let output = within("mmun trace", move || command.output().unwrap());
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(
        line.contains("cut-spool") && line.contains(": File too large; the trace "),
        "{line}"
    );
    // The page has the records up to the limit, so the file of the records was removed.
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    // The program has continued to its end.
    assert_eq!(text(&output.stdout), "alive\n");
    fs::remove_file(page).unwrap();
    fs::remove_dir(folder).unwrap();
}
