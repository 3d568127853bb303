-- A ledger as version 1 wrote it; never to be changed.
BEGIN TRANSACTION;
CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        event TEXT NOT NULL,
        device TEXT,
        lease TEXT,
        detail TEXT NOT NULL,
        at TEXT NOT NULL
    );
INSERT INTO "audit" VALUES(1,'data deleted','ue2','0-ue2','1000 bytes','2026-01-02T03:04:05.000+00:00');
CREATE TABLE credentials (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (name),
        token_sha256 TEXT NOT NULL UNIQUE,
        key_sha256 TEXT UNIQUE,
        revoked INTEGER NOT NULL DEFAULT 0,
        issued_at TEXT NOT NULL,
        enrolled_at TEXT
    );
INSERT INTO "credentials" VALUES(1,'ue1','d83ad31872c4b394ed2e07d89ec07a603b55128252a235ac9c6792c279e61ba2','e3732384877c1ffdbf6f29b53c3000fa5c095e1b05da10d6a432487cc3e9dfc6',0,'2026-01-02T03:04:05.000+00:00','2026-01-02T03:04:05.000+00:00');
INSERT INTO "credentials" VALUES(2,'ue2','dc510c2dc02dc3a1e79154166e68e3f5fbda5c41e2e7cfee5c5ee1cb8c0f4ea2','00f5662041d60b97ff5303907ac6d0d91a89d455531510fe57bfbcbc7ce210a5',0,'2026-01-02T03:04:05.000+00:00','2026-01-02T03:04:05.000+00:00');
CREATE TABLE devices (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        has_left INTEGER NOT NULL DEFAULT 0,
        added_at TEXT NOT NULL
    );
INSERT INTO "devices" VALUES(1,'ue1',0,'2026-01-02T03:04:05.000+00:00');
INSERT INTO "devices" VALUES(2,'ue2',1,'2026-01-02T03:04:05.000+00:00');
CREATE TABLE leases (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        lease TEXT NOT NULL UNIQUE,
        step INTEGER NOT NULL REFERENCES steps (number),
        device TEXT NOT NULL REFERENCES devices (name),
        task TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('train', 'upload', 'stop')),
        retention REAL,
        at_server INTEGER NOT NULL,
        emulator_name TEXT,
        message TEXT NOT NULL,
        predicted_bytes INTEGER NOT NULL,
        predicted_delay_s REAL NOT NULL,
        predicted_perplexity REAL,
        gain REAL,
        complexity REAL,
        rate_bps REAL,
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'expired', 'failed', 'late', 'done')),
        data_complete INTEGER NOT NULL DEFAULT 0,
        transferred_s REAL,
        transferred_bytes INTEGER,
        adapter_sha256 TEXT,
        before REAL,
        after REAL,
        accepted INTEGER,
        outcome TEXT,
        result TEXT,
        opened_at TEXT NOT NULL,
        closed_at TEXT
    );
INSERT INTO "leases" VALUES(1,'0-ue1',0,'ue1','a','train',0.5,0,'half','{"version":1,"lease":"0-ue1","step":0,"kind":"train","task":"a","emulator":null,"start":null,"training":{"adapter":"lora","width":8,"steps":20,"batch":4,"learning_rate":0.001,"block":128,"seed":0},"rate_bps":null,"deadline_s":0.0}',1000,2.0,20.0,NULL,NULL,NULL,'done',0,2.5,1000,'2a5f22be28730f1a901cbb33c10671e2cbcb4fe0bfebc0dc949b0d4ce0adb19e',25.0,21.0,1,'trained','{"outcome":"trained","reason":"","adapter":"2a5f22be28730f1a901cbb33c10671e2cbcb4fe0bfebc0dc949b0d4ce0adb19e","before":null,"after":null,"training_s":null}','2026-01-02T03:04:05.000+00:00','2026-01-02T03:04:05.000+00:00');
INSERT INTO "leases" VALUES(2,'0-ue2',0,'ue2','a','upload',NULL,1,'half','{"version":1,"lease":"0-ue2","step":0,"kind":"upload","task":"a","emulator":null,"start":null,"training":{"adapter":"lora","width":8,"steps":20,"batch":4,"learning_rate":0.001,"block":128,"seed":0},"rate_bps":null,"deadline_s":0.0}',1000,2.0,20.0,NULL,NULL,NULL,'expired',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,'2026-01-02T03:04:05.000+00:00','2026-01-02T03:04:05.000+00:00');
INSERT INTO "leases" VALUES(3,'1-ue1',1,'ue1','b','train',0.5,0,'half','{"version":1,"lease":"1-ue1","step":1,"kind":"train","task":"b","emulator":null,"start":null,"training":{"adapter":"lora","width":8,"steps":20,"batch":4,"learning_rate":0.001,"block":128,"seed":0},"rate_bps":null,"deadline_s":0.0}',1000,2.0,20.0,NULL,NULL,NULL,'open',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,'2026-01-02T03:04:05.000+00:00',NULL);
CREATE TABLE meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    );
INSERT INTO "meta" VALUES('base','cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2');
CREATE TABLE reports (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (name),
        task TEXT NOT NULL,
        message TEXT NOT NULL,
        received_at TEXT NOT NULL,
        UNIQUE (device, task)
    );
INSERT INTO "reports" VALUES(1,'ue1','a','{"task":"a","data_bytes":1000,"data_sha256":"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb","perplexity_ratio":null,"gain":null,"emulator":null,"cache_bytes":1048576}','2026-01-02T03:04:05.000+00:00');
INSERT INTO "reports" VALUES(2,'ue2','a','{"task":"a","data_bytes":1000,"data_sha256":"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb","perplexity_ratio":null,"gain":null,"emulator":null,"cache_bytes":1048576}','2026-01-02T03:04:05.000+00:00');
INSERT INTO "reports" VALUES(3,'ue1','b','{"task":"b","data_bytes":1000,"data_sha256":"3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d","perplexity_ratio":null,"gain":null,"emulator":null,"cache_bytes":1048576}','2026-01-02T03:04:05.000+00:00');
INSERT INTO "reports" VALUES(4,'ue1','c','{"task":"c","data_bytes":1000,"data_sha256":"2e7d2c03a9507ae265ecf5b5356885a53393a2029d241394997265a1a25aefc6","perplexity_ratio":null,"gain":null,"emulator":null,"cache_bytes":1048576}','2026-01-02T03:04:05.000+00:00');
CREATE TABLE schema_version (
        version INTEGER PRIMARY KEY,
        reached_at TEXT NOT NULL
    );
INSERT INTO "schema_version" VALUES(1,'2026-01-02T03:04:05.000+00:00');
CREATE TABLE steps (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        number INTEGER NOT NULL UNIQUE,
        delay_s REAL,
        begun_at TEXT NOT NULL,
        ended_at TEXT
    );
INSERT INTO "steps" VALUES(1,0,2.5,'2026-01-02T03:04:05.000+00:00','2026-01-02T03:04:05.000+00:00');
INSERT INTO "steps" VALUES(2,1,NULL,'2026-01-02T03:04:05.000+00:00',NULL);
CREATE UNIQUE INDEX leases_by_task ON leases (device, task) WHERE kind <> 'stop';
CREATE INDEX leases_by_step ON leases (step);
CREATE UNIQUE INDEX audit_by_lease ON audit (event, ifnull(device, ''), lease, detail)
    WHERE lease IS NOT NULL
    ;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('devices',2);
INSERT INTO "sqlite_sequence" VALUES('credentials',2);
INSERT INTO "sqlite_sequence" VALUES('reports',4);
INSERT INTO "sqlite_sequence" VALUES('steps',2);
INSERT INTO "sqlite_sequence" VALUES('leases',3);
INSERT INTO "sqlite_sequence" VALUES('audit',1);
PRAGMA application_id = 1701672308;
PRAGMA user_version = 1;
COMMIT;
