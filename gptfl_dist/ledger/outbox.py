"""What the audit log is to tell, written in the same transaction as what happened.

Triggers see to that, so nothing changes the ledger without its event, whichever process writes: `gptfl pause` is a
process of its own. A coordinator at work carries the events into the log (`run.auditor`) and then deletes them here.
One that is killed in between may find in both what it had written; an event has a token of its own, by which it is
known again in the log.
"""

from __future__ import annotations

from gptfl_dist.federation.orders import RECALLED, REFUSED
from gptfl_dist.ledger.record import EPOCH
from gptfl_dist.ledger.requests import ABORT, PAUSE

NOTE = "INSERT INTO outbox (event, fields) VALUES (?, ?)"

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY,
    token TEXT NOT NULL DEFAULT (lower(hex(randomblob(8)))),
    time TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')),
    event TEXT NOT NULL, fields TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS arm_begun AFTER INSERT ON arms BEGIN
    INSERT INTO outbox (event, fields) VALUES ('arm begun',
        json_object('arm', NEW.arm, 'weights', NEW.start, 'learning_rate', NEW.learning_rate));
END;
CREATE TRIGGER IF NOT EXISTS arm_finished AFTER UPDATE OF finished ON arms WHEN NEW.finished BEGIN
    INSERT INTO outbox (event, fields) VALUES ('arm finished',
        json_object('arm', NEW.arm, 'best_round', NEW.best_round));
END;
CREATE TRIGGER IF NOT EXISTS round_begun AFTER INSERT ON rounds BEGIN
    INSERT INTO outbox (event, fields) VALUES ('round begun',
        json_object('arm', NEW.arm, 'round', NEW.round, 'kind', NEW.kind, 'base', NEW.base,
                    'cohort', json(NEW.cohort)));
END;
CREATE TRIGGER IF NOT EXISTS round_committed AFTER UPDATE OF weights ON rounds BEGIN
    INSERT INTO outbox (event, fields) SELECT 'round committed',
        json_object('arm', NEW.arm, 'round', NEW.round, 'base', NEW.base, 'weights', NEW.weights,
                    'updates', json_group_object(silo, nonce))
    FROM orders WHERE arm = NEW.arm AND counted = NEW.round;
END;
CREATE TRIGGER IF NOT EXISTS answer_accepted AFTER UPDATE OF digest ON orders BEGIN
    INSERT INTO outbox (event, fields) SELECT
        CASE kind WHEN 'train' THEN 'update accepted' ELSE 'evaluation accepted' END,
        json_patch(  -- which leaves out what is null
            json_object('silo', NEW.silo, 'arm', arm, 'round', round, 'base', base, 'digest', NEW.digest,
                        'samples', NEW.samples, 'nonce', NEW.nonce),
            json_object('statement', NEW.statement, 'signature', NEW.signature, 'signer', NEW.signer))
    FROM rounds WHERE arm = NEW.arm AND round = NEW.round;
END;
CREATE TRIGGER IF NOT EXISTS signer_known AFTER INSERT ON signers BEGIN
    INSERT INTO outbox (event, fields) VALUES ('signer known',
        json_object('signer', NEW.fingerprint, 'certificate', NEW.certificate));
END;
CREATE TRIGGER IF NOT EXISTS order_failed AFTER UPDATE OF failure ON orders WHEN NEW.failure IS NOT NULL BEGIN
    INSERT INTO outbox (event, fields) VALUES (
        CASE 1 WHEN instr(NEW.failure, '{REFUSED}') THEN 'update refused'
               WHEN instr(NEW.failure, '{RECALLED}') THEN 'order recalled' ELSE 'order failed' END,
        json_object('silo', NEW.silo, 'arm', NEW.arm, 'round', NEW.round, 'nonce', NEW.nonce,
                    'reason', NEW.failure));
END;
CREATE TRIGGER IF NOT EXISTS pause_asked AFTER INSERT ON facts WHEN NEW.name = '{PAUSE}' BEGIN
    INSERT INTO outbox (event, fields) VALUES ('pause asked', json_object());
END;
CREATE TRIGGER IF NOT EXISTS resume_asked AFTER DELETE ON facts WHEN OLD.name = '{PAUSE}' BEGIN
    INSERT INTO outbox (event, fields) VALUES ('resume asked', json_object());
END;
CREATE TRIGGER IF NOT EXISTS epoch_begun AFTER INSERT ON facts WHEN NEW.name = '{EPOCH}' BEGIN
    INSERT INTO outbox (event, fields) VALUES ('epoch begun',
        json_object('epoch', json_extract(NEW.value, '$.number'),
                    'rounds', json(json_extract(json_extract(NEW.value, '$.statement'), '$.rounds')),
                    'reason', json_extract(json_extract(NEW.value, '$.statement'), '$.reason'),
                    'statement', json_extract(NEW.value, '$.statement'),
                    'signature', json_extract(NEW.value, '$.signature')));
END;
CREATE TRIGGER IF NOT EXISTS abort_asked AFTER INSERT ON facts WHEN NEW.name = '{ABORT}' BEGIN
    INSERT INTO outbox (event, fields) VALUES ('abort asked',
        json_object('reason', json_extract(NEW.value, '$.reason')));
END;
"""
