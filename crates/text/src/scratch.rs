use crate::*;
use std::path::Path;
#[test]
fn real() {
    let v: serde_json::Value = serde_json::from_slice(&std::fs::read("/tmp/w/tt_vocab.json").unwrap()).unwrap();
    let t0 = std::time::Instant::now();
    let vocab = GgufVocabulary { model: "gpt2".into(), pre: Some("smollm".into()),
        tokens: serde_json::from_value(v["tokens"].clone()).unwrap(), token_types: serde_json::from_value(v["types"].clone()).unwrap(),
        merges: serde_json::from_value(v["merges"].clone()).unwrap(), bos: Some(1), eos: Some(2), unknown: Some(0), padding: Some(2),
        add_bos: Some(false), add_space_prefix: Some(false), chat_template: Some(v["template"].as_str().unwrap().into()), ..Default::default() };
    let gguf = Tokenizer::from_gguf(vocab).unwrap();
    println!("gguf {:?}", t0.elapsed());
    let t0 = std::time::Instant::now();
    let reference = Path::new("/work/shared/reference/smollm2-135m");
    let folder = Tokenizer::from_folder(reference).unwrap();
    println!("folder {:?}", t0.elapsed());
    println!("{:?} {:?} {} {}", gguf.special_tokens(), folder.special_tokens(), gguf.vocab_size(), folder.vocab_size());
    assert_eq!(gguf.chat_template(), folder.chat_template());
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(reference.join("tokenizer_cases.json")).unwrap()).unwrap();
    for t in [&gguf, &folder] {
        let mut ok = 0;
        for c in &cases {
            let ids: Vec<u32> = serde_json::from_value(c["ids"].clone()).unwrap();
            let text = c["text"].as_str().unwrap();
            assert_eq!(t.encode(text, false).unwrap(), ids, "{text:?}");
            assert_eq!(t.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(t.decode(&ids, false).unwrap(), c["decoded"].as_str().unwrap());
            let mut s = StreamDecoder::new(t, false);
            let mut out = String::new();
            for &i in &ids { out += &s.push(i).unwrap(); }
            out += &s.finish().unwrap();
            assert_eq!(out, c["decoded"].as_str().unwrap());
            ok += 1;
        }
        println!("{ok} cases ok of {}", cases.len());
    }
    let facts: serde_json::Value = serde_json::from_slice(&std::fs::read(reference.join("facts.json")).unwrap()).unwrap();
    let template = ChatTemplate::of(&gguf, None).unwrap().unwrap();
    for g in facts["greedy"].as_array().unwrap() {
        let text = template.render(&[Message::new("user", g["prompt"].as_str().unwrap())], true).unwrap();
        let ids: Vec<u32> = serde_json::from_value(g["prompt_ids"].clone()).unwrap();
        assert_eq!(gguf.encode(&text, false).unwrap(), ids);
    }
    // corpus agreement and speed
    let files = source::files(&["/tmp/w/shakx/**/*.txt".to_string()]).unwrap();
    let texts: Vec<String> = files.iter().filter_map(|f| std::fs::read_to_string(f).ok()).collect();
    let bytes: usize = texts.iter().map(|t| t.len()).sum();
    let t0 = std::time::Instant::now();
    let a = gguf.encode_batch(&texts, false).unwrap();
    let dt = t0.elapsed();
    let b = folder.encode_batch(&texts, false).unwrap();
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
    println!("{} files {} bytes {} tokens in {:?}; {} agree", files.len(), bytes, a.iter().map(Vec::len).sum::<usize>(), dt, same);
    gguf.save(Path::new("/tmp/w/tt_saved")).unwrap();
    let options = PrepareOptions { train: vec!["/tmp/w/shakx/**/*.txt".into()], ..Default::default() };
    for _ in 0..2 {
        let t0 = std::time::Instant::now();
        let r = prepare(Path::new("/tmp/w/tt_prepared"), &options, &gguf, Some(&template), &mut |_| ()).unwrap();
        println!("{:?} {:?}", t0.elapsed(), r.train);
        println!("{:?} reused {}", r.validation, r.reused);
    }
}
