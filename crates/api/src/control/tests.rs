use std::io::Cursor;

use super::*;

#[test]
fn messages_survive_the_wire() {
    let messages = [
        Message::Reply {
            id: 7,
            outcome: Outcome::Failed("no".into()),
        },
        Message::Event(Event::KernelPanic {
            line: "a\nb".into(),
        }),
        Message::Event(Event::Ended(Ending::DebugExit { code: 3 })),
        Message::Event(Event::Ended(Ending::PowerOff)),
    ];
    let mut wire = Vec::new();
    for m in &messages {
        send(&mut wire, m).unwrap();
    }
    let mut from = Cursor::new(wire);
    for m in &messages {
        assert_eq!(receive::<Message>(&mut from).unwrap().as_ref(), Some(m));
    }
    assert_eq!(receive::<Message>(&mut from).unwrap(), None);
}

#[test]
fn cut_off_message_is_an_error() {
    let e = receive::<Request>(&mut Cursor::new(b"{\"id\":1".to_vec())).unwrap_err();
    assert!(e.to_string().contains("cut off"));
}

#[test]
fn endless_line_is_refused_at_the_limit() {
    let mut endless = io::BufReader::new(io::repeat(b'x'));
    assert!(
        receive::<Request>(&mut endless)
            .unwrap_err()
            .to_string()
            .contains("too long")
    );
}

#[test]
fn unknown_command_is_refused() {
    let line = b"{\"id\":1,\"command\":{\"do\":\"explode\"}}\n".to_vec();
    assert!(receive::<Request>(&mut Cursor::new(line)).is_err());
}
