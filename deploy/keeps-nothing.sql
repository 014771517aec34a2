-- The tables in which the stock server would keep what callers send to the Responses API. It inserts each response, and cannot
-- be told not to. A trigger drops every row before it is written: `upsert` and `insert` alike then succeed, and keep nothing.
-- The columns are the server's own, because it adds those that are missing and selects by name.

BEGIN;

CREATE TABLE responses (id VARCHAR PRIMARY KEY NOT NULL, created_at INTEGER, response_object JSON, model VARCHAR,
  access_attributes JSON, owner_principal VARCHAR);
CREATE TRIGGER no_response BEFORE INSERT ON responses BEGIN
  -- One that is queued to run in the background would not be found again, while its worker held on to the caller's key.
  SELECT RAISE(ABORT, 'nothing runs in the background') WHERE json_extract(NEW.response_object, '$.status') = 'queued';
  SELECT RAISE(IGNORE);
END;

CREATE TABLE conversation_messages (conversation_id VARCHAR PRIMARY KEY NOT NULL, messages JSON,
  access_attributes JSON, owner_principal VARCHAR);
CREATE TRIGGER no_message BEFORE INSERT ON conversation_messages BEGIN SELECT RAISE(IGNORE); END;

CREATE TABLE openai_conversations (id VARCHAR PRIMARY KEY NOT NULL, created_at INTEGER, items JSON, metadata JSON,
  access_attributes JSON, owner_principal VARCHAR);
CREATE TRIGGER no_conversation BEFORE INSERT ON openai_conversations BEGIN SELECT RAISE(IGNORE); END;

CREATE TABLE conversation_items (id VARCHAR PRIMARY KEY NOT NULL, conversation_id VARCHAR, created_at INTEGER,
  item_data JSON, access_attributes JSON, owner_principal VARCHAR);
CREATE TRIGGER no_item BEFORE INSERT ON conversation_items BEGIN SELECT RAISE(IGNORE); END;

CREATE TABLE openai_files (id VARCHAR PRIMARY KEY NOT NULL, filename VARCHAR, purpose VARCHAR, bytes INTEGER,
  created_at INTEGER, expires_at INTEGER, file_path VARCHAR, access_attributes JSON, owner_principal VARCHAR);
CREATE TRIGGER no_file BEFORE INSERT ON openai_files BEGIN SELECT RAISE(IGNORE); END;

COMMIT;
