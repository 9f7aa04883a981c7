//! Stand-in while the crate is written: correct, slow.
#![allow(missing_docs, clippy::all, reason = "about to be replaced")]
use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
#[derive(Debug, Default)]
struct Inner {
    state: Mutex<(usize, [usize; 2])>,
    cv: Condvar,
    gp: Mutex<()>,
}
#[derive(Debug)]
pub struct Srcu(OnceLock<Arc<Inner>>);
#[derive(Debug)]
pub struct Head(());
#[derive(Debug)]
pub struct Guard<'a> {
    inner: &'a Inner,
    bank: usize,
    no_send: PhantomData<*const ()>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WouldDeadlock;
impl std::fmt::Display for WouldDeadlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("waiting here would wait for this thread itself: wait outside sections and callbacks")
    }
}
impl std::error::Error for WouldDeadlock {}
impl Head {
    pub const fn new() -> Self {
        Head(())
    }
}
thread_local! { static HELD: RefCell<HashMap<usize, usize>> = RefCell::default(); }
impl Inner {
    fn wait(&self) {
        let _gp = self.gp.lock().unwrap();
        for _ in 0..2 {
            let mut s = self.state.lock().unwrap();
            let old = s.0;
            s.0 = 1 - old;
            while s.1[old] != 0 {
                s = self.cv.wait(s).unwrap();
            }
        }
    }
}
impl Srcu {
    pub const fn new() -> Self {
        Srcu(OnceLock::new())
    }
    fn inner(&self) -> &Arc<Inner> {
        self.0.get_or_init(Default::default)
    }
    pub fn prepare(&self) {}
    pub fn read_lock(&self) -> Guard<'_> {
        let inner = self.inner();
        let mut s = inner.state.lock().unwrap();
        let bank = s.0;
        s.1[bank] += 1;
        HELD.with_borrow_mut(|h| *h.entry(Arc::as_ptr(inner) as usize).or_default() += 1);
        Guard { inner, bank, no_send: PhantomData }
    }
    pub fn read_lock_held(&self) -> bool {
        HELD.with_borrow(|h| h.get(&(Arc::as_ptr(self.inner()) as usize)).is_some_and(|n| *n > 0))
    }
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        if self.read_lock_held() {
            return Err(WouldDeadlock);
        }
        self.inner().wait();
        Ok(())
    }
    pub fn call(&self, f: impl FnOnce() + Send + 'static) {
        let inner = self.inner().clone();
        std::thread::spawn(move || {
            inner.wait();
            f();
        });
    }
    pub unsafe fn call_raw(&self, head: NonNull<Head>, f: unsafe fn(NonNull<Head>)) {
        let inner = self.inner().clone();
        let head = head.as_ptr() as usize;
        std::thread::spawn(move || {
            inner.wait();
            unsafe { f(NonNull::new(head as *mut Head).unwrap()) };
        });
    }
}
impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut s = self.inner.state.lock().unwrap();
        s.1[self.bank] -= 1;
        let key = self.inner as *const Inner as usize;
        HELD.with_borrow_mut(|h| *h.get_mut(&key).unwrap() -= 1);
        self.inner.cv.notify_all();
    }
}
