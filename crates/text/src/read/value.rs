//! Cells of Arrow arrays as JSON values.
use arrow_array::{
    Array, ArrayRef,
    cast::AsArray,
    types::{
        ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
        UInt8Type, UInt16Type, UInt32Type, UInt64Type,
    },
};
use arrow_schema::DataType;
use serde_json::{Map, Number, Value};

/// The cell `index` of `array`. In structures fields without a value are left out: columnar files give every message
/// every field that any of them has.
///
/// # Errors
/// A type that no row of text is made of.
pub(super) fn value(array: &dyn Array, index: usize) -> Result<Value, String> {
    if array.is_null(index) {
        return Ok(Value::Null);
    }
    let list = |items: ArrayRef| (0..items.len()).map(|i| value(&items, i)).collect::<Result<Vec<_>, _>>();
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(index).into(),
        DataType::Utf8 => array.as_string::<i32>().value(index).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(index).into(),
        DataType::Utf8View => array.as_string_view().value(index).into(),
        DataType::Int8 => integer::<Int8Type>(array, index),
        DataType::Int16 => integer::<Int16Type>(array, index),
        DataType::Int32 => integer::<Int32Type>(array, index),
        DataType::Int64 => integer::<Int64Type>(array, index),
        DataType::UInt8 => integer::<UInt8Type>(array, index),
        DataType::UInt16 => integer::<UInt16Type>(array, index),
        DataType::UInt32 => integer::<UInt32Type>(array, index),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(index).into(),
        DataType::Float16 => float(array.as_primitive::<Float16Type>().value(index).into()),
        DataType::Float32 => float(array.as_primitive::<Float32Type>().value(index).into()),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(index)),
        DataType::List(_) => list(array.as_list::<i32>().value(index))?.into(),
        DataType::LargeList(_) => list(array.as_list::<i64>().value(index))?.into(),
        DataType::ListView(_) => list(array.as_list_view::<i32>().value(index))?.into(),
        DataType::LargeListView(_) => list(array.as_list_view::<i64>().value(index))?.into(),
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(index))?.into(),
        DataType::Struct(fields) => {
            let mut object = Map::new();
            for (field, column) in fields.iter().zip(array.as_struct().columns()) {
                match value(column, index)? {
                    Value::Null => {}
                    found => drop(object.insert(field.name().clone(), found)),
                }
            }
            object.into()
        }
        DataType::Map(..) => {
            let entries = array.as_map().value(index);
            let mut object = Map::new();
            for i in 0..entries.len() {
                let Value::String(key) = value(entries.column(0), i)? else {
                    return Err("a map whose keys are no strings".into());
                };
                object.insert(key, value(entries.column(1), i)?);
            }
            object.into()
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = dictionary.normalized_keys()[index];
            value(dictionary.values(), key)?
        }
        other => return Err(format!("the type {other}")),
    })
}

fn integer<T: ArrowPrimitiveType<Native: Into<i64>>>(array: &dyn Array, index: usize) -> Value {
    let number: i64 = array.as_primitive::<T>().value(index).into();
    number.into()
}

/// JSON has no infinity and no NaN.
fn float(number: f64) -> Value {
    Number::from_f64(number).map_or(Value::Null, Value::Number)
}
