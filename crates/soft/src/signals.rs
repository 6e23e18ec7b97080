//! Host signals.
/// For the calling thread.
pub fn prepare_thread() {}
/// Who gets signals in translated code.
pub fn set_translator_hook(hook: fn(i32, &mut libc::ucontext_t) -> bool) {
    let _ = hook;
}
