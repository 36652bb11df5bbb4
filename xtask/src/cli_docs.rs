//! docs/cli.md from the tree of clap commands.

use clap::{Arg, Command, CommandFactory, builder::StyledStr};

/// The whole page.
pub(crate) fn markdown() -> String {
    let mut root = tunesmith::args::Cli::command();
    // Gives the subcommands their full names.
    root.build();
    let mut page = String::from(
        "# Command line\n\n\
         Made from the code by `cargo xtask docs`; do not edit. `tunesmith COMMAND --help` says the same.\n\n\
         Exit codes: 0 when all went well; 2 for a mistake in what was given (the message names the file, line or field, \
         the value and the way out); 130 when stopped with Ctrl-C; 1 for everything else, also when `verify` finds a \
         difference beyond tolerance.\n\n",
    );
    let about = text(root.get_about());
    page.push_str(&format!("{about}.\n\n"));
    for command in shown(&root) {
        let name = command.get_bin_name().unwrap_or_default();
        let anchor = name.replace(' ', "-");
        page.push_str(&format!("* [`{name}`](#{anchor}): {}\n", text(command.get_about())));
    }
    page.push_str("\nFor every command:\n\n");
    page.push_str(&arguments(root.get_arguments().filter(|arg| arg.is_global_set())));
    for command in shown(&root) {
        section(command, &mut page);
    }
    page
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|sub| sub.get_name() != "help")
}

fn section(command: &Command, page: &mut String) {
    let usage = command.clone().render_usage().to_string();
    page.push_str(&format!("\n## {}\n\n", command.get_bin_name().unwrap_or_default()));
    let about = text(command.get_long_about().or(command.get_about()));
    page.push_str(&format!("{}.\n\n", about.trim_end_matches('.')));
    page.push_str(&format!("```text\n{}\n```\n", usage.trim_start_matches("Usage: ")));
    let own = arguments(command.get_arguments().filter(|arg| !arg.is_global_set()));
    if !own.is_empty() {
        page.push('\n');
        page.push_str(&own);
    }
    for sub in shown(command) {
        section(sub, page);
    }
}

/// A table of arguments, positional ones first; empty without any.
fn arguments<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let mut arguments: Vec<&Arg> =
        arguments.filter(|arg| !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version")).collect();
    if arguments.is_empty() {
        return String::new();
    }
    arguments.sort_by_key(|arg| !arg.is_positional());
    let mut table = String::from("| Argument | Default | Meaning |\n|---|---|---|\n");
    for arg in arguments {
        let default: Vec<String> =
            arg.get_default_values().iter().map(|v| format!("`{}`", cell(&v.to_string_lossy()))).collect();
        let default = match default[..] {
            [] if arg.is_required_set() => "required".to_owned(),
            _ if !arg.get_action().takes_values() => String::new(),
            _ => default.join(", "),
        };
        let help = text(arg.get_long_help().or(arg.get_help()));
        let meaning = cell(&format!("{}.{}", help.trim_end_matches('.'), choices(arg)));
        table.push_str(&format!("| `{}` | {default} | {meaning} |\n", cell(&name(arg))));
    }
    table
}

fn name(arg: &Arg) -> String {
    let values: Vec<&str> = arg.get_value_names().unwrap_or_default().iter().map(|v| v.as_str()).collect();
    let values = values.join(" ");
    match arg.get_long() {
        _ if arg.is_positional() => format!("<{values}>"),
        Some(long) if arg.get_action().takes_values() => format!("--{long} <{values}>"),
        Some(long) => format!("--{long}"),
        None => arg.get_id().to_string(),
    }
}

/// ` One of ...` for an argument with a closed list of values.
fn choices(arg: &Arg) -> String {
    if !arg.get_action().takes_values() {
        return String::new();
    }
    let values: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| {
            let help = text(value.get_help());
            let help = help.trim_end_matches('.');
            if help.is_empty() { format!("`{}`", value.get_name()) } else { format!("`{}` ({help})", value.get_name()) }
        })
        .collect();
    if values.is_empty() { String::new() } else { format!(" One of: {}.", values.join(", ")) }
}

fn text(styled: Option<&StyledStr>) -> String {
    styled.map(|s| s.to_string().replace('\n', " ")).unwrap_or_default()
}

/// What may stand in a cell of a Markdown table.
pub(crate) fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_argument_is_there() {
        let page = markdown();
        let mut root = tunesmith::args::Cli::command();
        root.build();
        let mut commands: Vec<&Command> = shown(&root).collect();
        assert!(commands.len() >= 9);
        while let Some(command) = commands.pop() {
            let name = command.get_bin_name().unwrap();
            assert!(page.contains(&format!("\n## {name}\n")), "{name}");
            for arg in command.get_arguments().filter_map(Arg::get_long).filter(|long| *long != "help") {
                assert!(page.contains(&format!("| `--{arg}")), "{name} --{arg}");
            }
            commands.extend(shown(command));
        }
        assert!(page.contains("| `--offline`"));
        assert!(page.contains("`smollm2-135m-instruct`"), "defaults are shown");
    }

    #[test]
    fn a_cell_stays_a_cell() {
        assert_eq!(cell("a|b\nc"), "a\\|b c");
    }
}
