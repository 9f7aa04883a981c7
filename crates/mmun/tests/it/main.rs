//! Runs `mmun` as a user does.

mod assembly;
mod bad_input;
mod broker;
mod browser;
mod coverage;
mod detach;
mod details;
mod doctor;
mod gdb;
mod hidden;
mod leaks;
mod lent;
mod manners;
mod odd;
mod own_files;
mod page;
mod records;
mod report;
mod run;
mod run_signals;
mod run_times;
mod streams;
mod support;
mod viewers;
