// A private file system in memory, for a browser that has none: what the page and its worker ask of it, each for itself.
(() => {
  const missing = (name) => new DOMException(`there is no ${name}`, "NotFoundError");

  class File {
    bytes = new Uint8Array(0);

    async getFile() {
      const { bytes } = this;
      return { size: bytes.length, slice: (start, end) => new Blob([bytes.slice(start, end)]) };
    }

    async createSyncAccessHandle() {
      return {
        getSize: () => this.bytes.length,
        read: (into, { at }) => {
          const part = this.bytes.subarray(at, at + into.length);
          into.set(part);
          return part.length;
        },
        write: (data, { at }) => {
          this.resize(Math.max(this.bytes.length, at + data.length));
          this.bytes.set(data, at);
          return data.length;
        },
        truncate: (size) => this.resize(size),
        flush: () => {},
        close: () => {},
      };
    }

    resize(size) {
      const before = this.bytes;
      this.bytes = new Uint8Array(size);
      this.bytes.set(before.subarray(0, size));
    }

    async move(folder, name) {
      this.folder.files.delete(this.name);
      folder.put(name, this);
    }
  }

  class Folder {
    files = new Map();

    put(name, file) {
      Object.assign(file, { folder: this, name });
      this.files.set(name, file);
      return file;
    }

    async get(name, Kind, create) {
      if (!this.files.has(name) && !create) throw missing(name);
      return this.files.get(name) ?? this.put(name, new Kind());
    }

    getFileHandle(name, options) {
      return this.get(name, File, options?.create);
    }

    getDirectoryHandle(name, options) {
      return this.get(name, Folder, options?.create);
    }

    async removeEntry(name) {
      if (!this.files.delete(name)) throw missing(name);
    }

    async *keys() {
      yield* [...this.files.keys()];
    }
  }

  const root = new Folder();
  const no = async () => false;
  const storage = { getDirectory: async () => root, estimate: async () => ({}), persisted: no, persist: no };
  Object.defineProperty(navigator, "storage", { value: storage });
})();
