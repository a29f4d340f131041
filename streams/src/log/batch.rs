//! Arrow batches as bytes: the IPC encoding, without what the schema or the data already says.
//!
//! An IPC message spends 16 bytes of metadata on every buffer and every column and repeats its frame for each
//! batch: for one trade that is most of the message. Here the lengths are variable-width integers, positions
//! follow from the lengths, and the message is put together again when a batch is read.

use crate::foreign::caught;
use arrow::array::ArrayRef;
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::convert::try_schema_from_flatbuffer_bytes;
use arrow::ipc::reader::{read_dictionary, read_record_batch};
use arrow::ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow::ipc::{self, DictionaryBatchBuilder, FieldNode, MetadataVersion, RecordBatchBuilder, root_as_message};
use arrow::record_batch::RecordBatch;
use flatbuffers::{FlatBufferBuilder, WIPOffset};
use std::collections::HashMap;
use std::sync::Arc;

/// Buffers of a body start at multiples of this, so that columns are read in place.
const ALIGNMENT: usize = 8;

/// A schema as the log keeps it: an IPC schema message.
pub(super) struct EncodedSchema {
    pub(super) ipc: Arc<[u8]>,
    /// Dictionary columns travel with their dictionaries, under ids that the schema gives them.
    has_dictionaries: bool,
}

impl EncodedSchema {
    pub(super) fn new(schema: &Schema) -> Self {
        let ipc = number_dictionaries(schema, &mut DictionaryTracker::new(false));
        let is_dictionary = |data_type: &DataType| matches!(data_type, DataType::Dictionary(_, _));
        let has_dictionaries = schema.flattened_fields().iter().any(|field| is_dictionary(field.data_type()));
        Self { ipc: ipc.into(), has_dictionaries }
    }
}

/// Reads back what [`EncodedSchema`] holds.
pub(super) fn decode_schema(ipc: &[u8]) -> Result<SchemaRef, ArrowError> {
    // flatbuffers are read in place and must be aligned
    read_back(|| Ok(Arc::new(try_schema_from_flatbuffer_bytes(&Buffer::from(ipc))?)))
}

/// The crate's readers panic on types and lengths that do not fit each other, and a checksum says only who wrote them.
fn read_back<T>(read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, ArrowError> {
    caught(read).unwrap_or_else(|| Err(malformed("its parts do not fit each other")))
}

/// Encodes the schema, which gives each of its dictionaries an id in `tracker`.
fn number_dictionaries(schema: &Schema, tracker: &mut DictionaryTracker) -> Vec<u8> {
    IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(schema, tracker, &write_options()).ipc_message
}

fn write_options() -> IpcWriteOptions {
    IpcWriteOptions::try_new(ALIGNMENT, false, MetadataVersion::V5).expect("alignment and version fit each other")
}

/// Appends `batch` to `out`; `schema` is that of the batch.
pub(super) fn encode(batch: &RecordBatch, schema: &EncodedSchema, out: &mut Vec<u8>) -> Result<(), ArrowError> {
    let mut tracker = DictionaryTracker::new(false);
    if schema.has_dictionaries {
        number_dictionaries(batch.schema_ref(), &mut tracker);
    }
    let mut context = IpcWriteContext::default();
    let (dictionaries, data) =
        IpcDataGenerator::default().encode(batch, &mut tracker, &write_options(), &mut context)?;
    put(out, dictionaries.len() as u64);
    for dictionary in &dictionaries {
        let message = root_as_message(&dictionary.ipc_message).map_err(|error| malformed(&error.to_string()))?;
        let header = message.header_as_dictionary_batch().ok_or_else(|| malformed("not a dictionary"))?;
        put(out, header.id() as u64);
        put_columns(out, header.data().ok_or_else(|| malformed("no dictionary values"))?, &dictionary.arrow_data)?;
    }
    let message = root_as_message(&data.ipc_message).map_err(|error| malformed(&error.to_string()))?;
    put_columns(out, message.header_as_record_batch().ok_or_else(|| malformed("not a batch"))?, &data.arrow_data)
}

/// Reads back what [`encode`] appended: all of `bytes`.
pub(super) fn decode(bytes: &[u8], schema: SchemaRef) -> Result<RecordBatch, ArrowError> {
    read_back(|| decode_whole(bytes, schema))
}

fn decode_whole(mut bytes: &[u8], schema: SchemaRef) -> Result<RecordBatch, ArrowError> {
    let mut dictionaries: HashMap<i64, ArrayRef> = HashMap::new();
    for _ in 0..take(&mut bytes)? {
        let id = take(&mut bytes)? as i64;
        let (lengths, body) = take_columns(&mut bytes)?;
        let mut builder = FlatBufferBuilder::new();
        let data = lengths.to_flatbuffer(&mut builder);
        let mut header = DictionaryBatchBuilder::new(&mut builder);
        header.add_id(id);
        header.add_data(data);
        let header = header.finish();
        builder.finish(header, None);
        let bytes = Buffer::from(builder.finished_data());
        let header =
            flatbuffers::root::<ipc::DictionaryBatch>(&bytes).map_err(|error| malformed(&error.to_string()))?;
        read_dictionary(&body, header, &schema, &mut dictionaries, &MetadataVersion::V5)?;
    }
    let (lengths, body) = take_columns(&mut bytes)?;
    if !bytes.is_empty() {
        return Err(malformed("bytes after the batch"));
    }
    let mut builder = FlatBufferBuilder::new();
    let header = lengths.to_flatbuffer(&mut builder);
    builder.finish(header, None);
    let bytes = Buffer::from(builder.finished_data());
    let header = flatbuffers::root::<ipc::RecordBatch>(&bytes).map_err(|error| malformed(&error.to_string()))?;
    read_record_batch(&body, header, schema, &dictionaries, None, &MetadataVersion::V5)
}

fn malformed(what: &str) -> ArrowError {
    ArrowError::ParseError(format!("malformed batch: {what}"))
}

/// What an IPC header says of its body, in the order of the columns.
struct Lengths {
    rows: i64,
    nodes: Vec<FieldNode>,
    buffers: Vec<ipc::Buffer>,
    variadic: Vec<i64>,
}

impl Lengths {
    fn to_flatbuffer<'b>(&self, builder: &mut FlatBufferBuilder<'b>) -> WIPOffset<ipc::RecordBatch<'b>> {
        let nodes = builder.create_vector(&self.nodes);
        let buffers = builder.create_vector(&self.buffers);
        let variadic = builder.create_vector(&self.variadic);
        let mut header = RecordBatchBuilder::new(builder);
        header.add_length(self.rows);
        header.add_nodes(nodes);
        header.add_buffers(buffers);
        header.add_variadicBufferCounts(variadic);
        header.finish()
    }
}

fn put_columns(out: &mut Vec<u8>, header: ipc::RecordBatch<'_>, body: &[u8]) -> Result<(), ArrowError> {
    let nodes = header.nodes().ok_or_else(|| malformed("no columns"))?;
    let buffers = header.buffers().ok_or_else(|| malformed("no buffers"))?;
    let variadic = header.variadicBufferCounts();
    put(out, header.length() as u64);
    put(out, nodes.len() as u64);
    for node in nodes {
        put(out, node.length() as u64);
        put(out, node.null_count() as u64);
    }
    put(out, variadic.map_or(0, |counts| counts.len()) as u64);
    variadic.into_iter().flatten().for_each(|count| put(out, count as u64));
    put(out, buffers.len() as u64);
    buffers.iter().for_each(|buffer| put(out, buffer.length() as u64));
    for buffer in buffers {
        let (start, length) = (buffer.offset() as usize, buffer.length() as usize);
        out.extend_from_slice(body.get(start..start + length).ok_or_else(|| malformed("buffer outside its body"))?);
        out.resize(out.len() + padding(length), 0);
    }
    Ok(())
}

fn take_columns(bytes: &mut &[u8]) -> Result<(Lengths, Buffer), ArrowError> {
    let rows = take(bytes)? as i64;
    let mut nodes = Vec::new();
    for _ in 0..take(bytes)? {
        nodes.push(FieldNode::new(take(bytes)? as i64, take(bytes)? as i64));
    }
    let mut variadic = Vec::new();
    for _ in 0..take(bytes)? {
        variadic.push(take(bytes)? as i64);
    }
    let mut buffers = Vec::new();
    let mut end = 0_usize;
    for _ in 0..take(bytes)? {
        let length = take(bytes)? as usize;
        buffers.push(ipc::Buffer::new(end as i64, length as i64));
        let padded = length.checked_add(padding(length));
        end = padded.and_then(|padded| end.checked_add(padded)).ok_or_else(|| malformed("buffer too long"))?;
    }
    let body = bytes.split_off(..end).ok_or_else(|| malformed("body cut short"))?;
    Ok((Lengths { rows, nodes, buffers, variadic }, Buffer::from(body)))
}

/// Bytes from `length` to the next multiple of the alignment.
fn padding(length: usize) -> usize {
    length.wrapping_neg() % ALIGNMENT
}

/// Appends `value` as LEB128: seven bits a byte, lowest first.
fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take(bytes: &mut &[u8]) -> Result<u64, ArrowError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first().ok_or_else(|| malformed("number cut short"))?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(malformed("number too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::*;
    use arrow::datatypes::{Int32Type, TimeUnit};
    use proptest::prelude::*;

    fn check(batch: &RecordBatch) {
        let schema = EncodedSchema::new(batch.schema_ref());
        let mut bytes = Vec::new();
        encode(batch, &schema, &mut bytes).unwrap();
        let back = decode(&bytes, decode_schema(&schema.ipc).unwrap()).unwrap();
        assert_eq!(&back, batch);
        for cut in 0..bytes.len().min(200) {
            assert!(decode(&bytes[..cut], batch.schema()).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn numbers_read_back_as_written() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            assert_eq!(take(&mut bytes.as_slice()).unwrap(), value);
        }
        assert!(take(&mut [0xff; 11].as_slice()).is_err());
    }

    #[test]
    fn nested_dictionary_and_view_columns_keep_their_values() {
        let words: DictionaryArray<Int32Type> = [Some("buy"), None, Some("sell"), Some("buy")].into_iter().collect();
        let views = StringViewArray::from(vec![Some("short"), Some("long enough for its own buffer"), None, Some("")]);
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([
            Some(vec![Some(1), None]),
            None,
            Some(vec![]),
            Some(vec![Some(7)]),
        ]);
        let columns: [(&str, ArrayRef); 4] = [
            ("word", Arc::new(words)),
            ("view", Arc::new(views)),
            ("list", Arc::new(lists)),
            ("nothing", Arc::new(NullArray::new(4))),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        check(&batch);
        check(&batch.slice(1, 2));
        check(&batch.slice(0, 0));
    }

    #[test]
    fn a_schema_or_a_batch_with_a_wrong_byte_is_read_or_malformed() {
        let batch = RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(vec![1, 2])) as ArrayRef)]).unwrap();
        let schema = EncodedSchema::new(batch.schema_ref());
        let mut bytes = Vec::new();
        encode(&batch, &schema, &mut bytes).unwrap();
        let mut caught = 0;
        for (whole, is_schema) in [(&schema.ipc[..], true), (&bytes, false)] {
            for (at, wrong) in (0..whole.len()).flat_map(|at| [0, 0x7f, 0xff].map(|wrong| (at, wrong))) {
                let mut changed = whole.to_vec();
                changed[at] = wrong;
                let read = match is_schema {
                    true => decode_schema(&changed).and_then(|schema| decode(&bytes, schema)),
                    false => decode(&changed, batch.schema()),
                };
                caught += usize::from(read.is_err_and(|error| error.to_string().contains("do not fit")));
            }
        }
        assert!(caught > 0, "the crate's readers panic no more: `read_back` can go");
    }

    #[test]
    fn a_batch_without_columns_keeps_its_row_count() {
        let options = RecordBatchOptions::new().with_row_count(Some(3));
        check(&RecordBatch::try_new_with_options(Arc::new(Schema::empty()), vec![], &options).unwrap());
    }

    #[test]
    fn a_slice_costs_its_own_rows_only() {
        let words = StringArray::from_iter_values((0..1_000).map(|i| format!("word number {i}")));
        let batch = RecordBatch::try_from_iter([("word", Arc::new(words) as ArrayRef)]).unwrap().slice(500, 1);
        let mut bytes = Vec::new();
        encode(&batch, &EncodedSchema::new(batch.schema_ref()), &mut bytes).unwrap();
        assert!(bytes.len() < 64, "{} bytes", bytes.len());
    }

    fn column(rows: usize) -> impl Strategy<Value = ArrayRef> {
        fn cells<T: Strategy>(value: T, rows: usize) -> impl Strategy<Value = Vec<Option<T::Value>>>
        where
            T::Value: Clone,
        {
            proptest::collection::vec(proptest::option::weighted(0.8, value), rows)
        }
        let decimal = (1_u8..=38).prop_flat_map(move |precision| {
            let most = 10_i128.pow(u32::from(precision)) - 1;
            (Just(precision), 0..=precision as i8, cells(-most..=most, rows))
        });
        prop_oneof![
            cells(any::<i64>(), rows).prop_map(|c| Arc::new(Int64Array::from(c)) as ArrayRef),
            cells(-1e12..1e12_f64, rows).prop_map(|c| Arc::new(Float64Array::from(c)) as ArrayRef),
            cells(any::<bool>(), rows).prop_map(|c| Arc::new(BooleanArray::from(c)) as ArrayRef),
            cells("\\PC{0,12}", rows).prop_map(|c| Arc::new(StringArray::from(c)) as ArrayRef),
            cells(any::<i64>(), rows)
                .prop_map(|c| Arc::new(TimestampMicrosecondArray::from(c).with_timezone("+00:00")) as ArrayRef),
            decimal.prop_map(
                |(p, s, c)| Arc::new(Decimal128Array::from(c).with_precision_and_scale(p, s).unwrap()) as ArrayRef
            ),
        ]
    }

    fn batch() -> impl Strategy<Value = RecordBatch> {
        (0_usize..40).prop_flat_map(|rows| proptest::collection::vec(column(rows), 1..8)).prop_map(|columns| {
            let named = columns.into_iter().enumerate().map(|(i, column)| (format!("column_{i}"), column, true));
            RecordBatch::try_from_iter_with_nullable(named).unwrap()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
        #[test]
        fn any_batch_of_any_schema_reads_back_as_written((batch, at) in (batch(), 0.0..1.0_f64)) {
            check(&batch);
            let start = (batch.num_rows() as f64 * at) as usize;
            check(&batch.slice(start, batch.num_rows() - start));
        }
    }

    #[test]
    fn all_types_of_a_stream_are_covered_when_every_value_is_null() {
        let types = [
            DataType::Utf8,
            DataType::Int64,
            DataType::Float64,
            DataType::Decimal128(18, 4),
            DataType::Boolean,
            DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())),
        ];
        let columns = types.iter().enumerate().map(|(i, kind)| (i.to_string(), new_null_array(kind, 3)));
        check(&RecordBatch::try_from_iter(columns).unwrap());
    }
}
