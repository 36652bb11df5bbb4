//! One module a command: plan, run, print.

