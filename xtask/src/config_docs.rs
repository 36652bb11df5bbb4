//! docs/config.md and docs/config.schema.json from the JSON schema and the defaults of the configuration.

use crate::{Result, cli_docs::cell};
use serde_json::{Map, Value};
use tunesmith_train::config::Config;

const SCHEDULES: [(&str, &str); 8] = [
    ("linear", "Falls on a straight line to 0."),
    ("cosine", "Falls along half a cosine to 0."),
    ("constant", "Stays as it is."),
    ("constant_with_warmup", "The same as `constant`: both honour the warm-up."),
    ("cosine_with_min_lr", "Falls along half a cosine to a share `min_lr_rate` (0.1) of the learning rate."),
    ("polynomial", "Falls as `(1 - progress)^power` (1.0) to a share `lr_end_rate` (1e-7)."),
    ("inverse_sqrt", "Falls as `1 / sqrt(step / timescale)`; `timescale` is the warm-up, or 10,000 without one."),
    (
        "warmup_stable_decay",
        "Stays, then falls along half a cosine to `min_lr_ratio` (0) over the last `num_decay_steps` (a tenth of the run).",
    ),
];

/// The JSON schema, as committed.
pub(crate) fn schema() -> Result<String> {
    Ok(format!("{:#}\n", schemars::schema_for!(Config).to_value()))
}

/// The whole page.
pub(crate) fn markdown() -> Result<String> {
    let schema = schemars::schema_for!(Config).to_value();
    let defaults =
        serde_json::to_value(Config::default()).map_err(|e| format!("the defaults do not serialise: {e}"))?;
    let mut page = String::from(
        "# Configuration\n\n\
         Made from the code by `cargo xtask docs`; do not edit.\n\n\
         `tunesmith train CONFIG.toml` reads a TOML file with the fields below. Every field has a default except \
         `model.source` and `data.train`. `--set section.field=value` overrides a field for one run. A field that does \
         not exist is an error that names the nearest one that does. The configuration with every default filled in is \
         written to `run.toml` in the run's folder, and that file is a configuration too. The same as a JSON schema, for \
         editors: [config.schema.json](config.schema.json).\n",
    );
    let properties = object(&schema, "properties")?;
    let (sections, fields): (Vec<_>, Vec<_>) =
        properties.iter().partition(|(_, field)| resolve(field, &schema).get("properties").is_some());
    section("Top level", "", &fields, &schema, &defaults, &mut page);
    for (name, field) in sections {
        let about = one_line(field);
        let inner = resolve(field, &schema);
        let fields: Vec<_> = object(inner, "properties")?.iter().collect();
        section(&format!("[{name}]"), &about, &fields, &schema, &defaults[name], &mut page);
    }
    page.push_str("\n## All defaults\n\n```toml\n");
    page.push_str(&Config::default().to_toml().map_err(|e| e.to_string())?);
    page.push_str("```\n");
    Ok(page)
}

fn object<'a>(value: &'a Value, key: &str) -> Result<&'a Map<String, Value>> {
    value.get(key).and_then(Value::as_object).ok_or_else(|| format!("the schema has no {key}"))
}

/// Follows a reference to the definition that it names; anything else stands for itself.
fn resolve<'a>(field: &'a Value, schema: &'a Value) -> &'a Value {
    let target = field.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix('#'));
    target.and_then(|pointer| schema.pointer(pointer)).unwrap_or(field)
}

fn one_line(field: &Value) -> String {
    field.get("description").and_then(Value::as_str).unwrap_or_default().replace('\n', " ")
}

fn section(
    title: &str,
    about: &str,
    fields: &[(&String, &Value)],
    schema: &Value,
    defaults: &Value,
    page: &mut String,
) {
    page.push_str(&format!("\n## {title}\n\n"));
    if !about.is_empty() {
        page.push_str(&format!("{about}\n\n"));
    }
    page.push_str("| Field | Type | Default | Meaning |\n|---|---|---|---|\n");
    let mut lists = String::new();
    for (name, field) in fields {
        let default = match &defaults[name.as_str()] {
            Value::Null => "not set".to_owned(),
            value => format!("`{}`", cell(&value.to_string())),
        };
        page.push_str(&format!(
            "| `{name}` | {} | {default} | {} |\n",
            cell(&type_name(field, schema)),
            cell(&one_line(field))
        ));
        let mut values = choices(field, schema);
        if name.as_str() == "lr_scheduler_type" {
            values = SCHEDULES.map(|(name, about)| (name.to_owned(), about.to_owned())).to_vec();
        }
        if !values.is_empty() {
            lists.push_str(&format!("\n`{name}` is one of:\n\n"));
            values.iter().for_each(|(value, about)| lists.push_str(&format!("* `\"{value}\"`: {about}\n")));
            if name.as_str() == "lr_scheduler_type" {
                lists.push_str(
                    "\nThose with arguments are written as a table when an argument differs from the one in brackets: \
                     `lr_scheduler_type = { cosine_with_min_lr = { min_lr_rate = 0.2 } }`.\n",
                );
            }
        }
    }
    page.push_str(&lists);
}

/// The alternatives of a field that is none of the plain types: `anyOf` of an optional one without its null.
fn alternatives(field: &Value) -> Option<&Value> {
    let any = field.get("anyOf")?.as_array()?;
    any.iter().find(|alternative| alternative.get("type").and_then(Value::as_str) != Some("null"))
}

/// Values and meanings of an enum.
fn choices(field: &Value, schema: &Value) -> Vec<(String, String)> {
    let field = resolve(alternatives(field).unwrap_or(field), schema);
    let constant = |v: &Value| Some((v.get("const")?.as_str()?.to_owned(), one_line(v)));
    match field.get("oneOf").and_then(Value::as_array) {
        Some(values) => values.iter().filter_map(constant).collect(),
        None => Vec::new(),
    }
}

fn type_name(field: &Value, schema: &Value) -> String {
    let field = resolve(alternatives(field).unwrap_or(field), schema);
    if field.get("oneOf").is_some() {
        return "one of the values below".to_owned();
    }
    let kind = match field.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().find(|kind| *kind != "null").and_then(Value::as_str),
        kind => kind.and_then(Value::as_str),
    };
    match kind {
        Some("array") => {
            let items = field.get("items").map_or_else(String::new, |items| type_name(items, schema));
            format!("list of {items}s")
        }
        Some(kind) => kind.to_owned(),
        None => "any".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_train::schedule::Schedule;

    #[test]
    fn every_default_is_on_the_page() {
        let page = markdown().unwrap();
        let defaults = serde_json::to_value(Config::default()).unwrap();
        for (name, value) in defaults.as_object().unwrap() {
            let names: Vec<&String> = value.as_object().map_or_else(|| vec![name], |section| section.keys().collect());
            for name in names {
                assert!(page.contains(&format!("\n| `{name}` | ")), "{name}");
            }
        }
        assert!(page.contains("| `r` | integer | `16` | Rank of A and B. |"), "{page}");
        assert!(page.contains("`method` is one of") && page.contains("* `\"full\"`: Every weight."), "{page}");
        assert!(page.contains("| `learning_rate` | number | not set |"));
        assert!(page.contains("| `target_modules` | list of strings | `[\"all-linear\"]` |"));
    }

    #[test]
    fn the_named_schedules_are_the_known_ones() {
        for (name, _) in SCHEDULES {
            assert_eq!(Schedule::from_name(name).unwrap().name(), name);
        }
    }

    #[test]
    fn the_schema_refuses_unknown_fields() {
        let schema: Value = serde_json::from_str(&schema().unwrap()).unwrap();
        assert_eq!(schema["additionalProperties"], false);
    }
}
