package repo

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"pgthaw/repo/store"
)

// divide enters an object and its regions.
func (c *damageCampaign) divide(key string) {
	c.t.Helper()
	b, err := c.store.Get(c.t.Context(), key, 0, -1)
	if err != nil {
		c.t.Fatal(err)
	}
	c.bodies[key] = b
	part := func(kind string, from, to int64) {
		if from < to {
			c.regions[kind] = append(c.regions[kind], region{key, span{from, to}})
		}
	}
	end := int64(len(b))
	switch kind := objectKind(key); kind {
	case "pack":
		cuts := packCuts(c.t, c.r, b)
		toc := len(cuts) - 2
		part("pack header", 0, objectHeaderSize)
		for i := range toc {
			part(c.pieceKind(b, i), cuts[i], cuts[i+1])
		}
		part("table of contents", cuts[toc], cuts[toc+1])
		part("trailer", cuts[toc+1], end)
	case "edition":
		e := editionAt(c.t, c.r, key)
		part("edition header", 0, editionHeaderSize)
		part("edition table", editionHeaderSize, e.at[0])
		for i, piece := range e.toc.kinds {
			part(pieceKinds[piece], e.at[i], e.at[i+1])
		}
	case "WAL":
		cuts := walCuts(c.t, c.r, key)
		part("WAL header", 0, cuts[0])
		part("WAL head", cuts[0], cuts[1])
		for i := range len(cuts) - 2 {
			part("WAL block", cuts[i+1], cuts[i+2])
		}
	default:
		part(kind, 0, end)
	}
}

func (c *damageCampaign) pieceKind(pack []byte, i int) string {
	c.t.Helper()
	end := uint32(len(pack))
	toc, err := c.r.readTOC(c.t.Context(), PackID(pack[16:32]), packSize{end, binary.LittleEndian.Uint32(pack[end-28:])})
	if err != nil {
		c.t.Fatal(err)
	}
	return pieceKinds[toc.kinds[i]]
}

var pieceKinds = map[byte]string{pieceChunk: "chunk", pieceMap: "map", pieceTree: "tree"}

// objectKind is what the key says an object is.
func objectKind(key string) string {
	first, _, _ := strings.Cut(key, "/")
	switch {
	case strings.HasSuffix(key, packListSuffix):
		return "pack list"
	case strings.HasSuffix(key, manifestSuffix):
		return "manifest"
	}
	if _, no, ok := editionOfKey(key); ok && no > 0 {
		return "edition"
	}
	names := map[string]string{"packs": "pack", "wal": "WAL", "clusters": "cluster", "keys": "key slot"}
	return cmp.Or(names[first], first)
}

// addOthers makes what objects are exchanged for.
func (c *damageCampaign) addOthers() {
	c.t.Helper()
	r := newDamagedRepository(c.t, &damagedStore{Mem: store.NewMem()}, c.keys, c.r.seals.master)
	files := smallFiles()
	for _, content := range files {
		for i := range content {
			content[i] ^= 0x55
		}
	}
	writeDamaged(c.t, r, files)
	c.foreign = map[string][][]byte{}
	for _, key := range storedKeys(c.t, r) {
		b, err := r.store.Get(c.t.Context(), key, 0, -1)
		if err != nil {
			c.t.Fatal(err)
		}
		c.foreign[objectKind(key)] = append(c.foreign[objectKind(key)], b)
	}
	if c.r.seals.master != nil {
		c.twins = c.resealed(&seals{c.r.seals.master, r.seals.id}, false)
		c.older = c.resealed(&c.r.seals, true)
	}
}

// resealed are the objects with the same content, but sealed otherwise. A pack's salt is its ID, which does not change.
func (c *damageCampaign) resealed(to *seals, newSalts bool) map[string][]byte {
	c.t.Helper()
	all := map[string][]byte{}
	for _, p := range sealedParts(c.t, c.r) {
		if newSalts && p.kind == kindPack {
			continue
		}
		b := all[p.object]
		if b == nil {
			b = bytes.Clone(c.bodies[p.object])
			if s := newSalt(); newSalts {
				copy(b[16:], s[:])
			}
			all[p.object] = b
		}
		content, err := c.r.seals.object(p.kind, p.object, p.salt).open(bytes.Clone(p.bytes), p.offset)
		if err != nil {
			c.t.Fatal(err)
		}
		sealer := to.object(p.kind, p.object, salt(b[16:objectHeaderSize]))
		copy(b[p.offset:], sealer.aead.Seal(nil, nonce(p.offset), content, sealer.data))
	}
	return all
}

// place chooses a byte: each kind of region as often as another.
func (c *damageCampaign) place() (kind, key string, at int64) {
	kind = c.kinds[c.rng.IntN(len(c.kinds))]
	g := c.regions[kind][c.rng.IntN(len(c.regions[kind]))]
	return kind, g.key, g.from + c.rng.Int64N(g.to-g.from)
}

// flip changes one bit.
func (c *damageCampaign) flip() repoDamage {
	kind, key, at := c.place()
	b, bit := c.bodies[key], byte(1)<<c.rng.IntN(8)
	b[at] ^= bit
	return repoDamage{what: fmt.Sprintf("flip of %#x at %d of %s, %s", bit, at, key, kind), kind: kind,
		bodies: map[string][]byte{key: b}, spans: map[string]span{key: {at, at + 1}},
		sure: c.r.seals.master != nil && kind != "key slot", undo: func() { b[at] ^= bit }} // one key slot of two is enough
}

// worse is a damage other than a flip.
func (c *damageCampaign) worse() repoDamage {
	all := []func() repoDamage{c.overwrite, c.cut, c.extend, c.remove, c.exchange, c.exchange, c.exchangePieces, c.exchangePieces, c.replaceForeign}
	if c.r.seals.master != nil {
		all = append(all, c.replaceTwin, c.replaceOlder, c.spliceOlder)
	}
	return all[c.rng.IntN(len(all))]()
}

// replaced is that objects as a whole are others.
func replaced(kind, what string, bodies map[string][]byte) repoDamage {
	d := repoDamage{what: what, kind: kind, bodies: bodies, spans: map[string]span{}, undo: func() {}}
	for key := range bodies {
		d.spans[key] = span{0, math.MaxInt64}
	}
	return d
}

func (c *damageCampaign) overwrite() repoDamage {
	kind, key, at := c.place()
	b := bytes.Clone(c.bodies[key])
	end := min(at+1+c.rng.Int64N(64), int64(len(b)))
	for i := at; i < end; i++ {
		b[i] = byte(c.rng.Uint32())
	}
	return replaced("overwriting", fmt.Sprintf("overwriting of %d to %d of %s, %s", at, end, key, kind), map[string][]byte{key: b})
}

func (c *damageCampaign) cut() repoDamage {
	kind, key, at := c.place()
	return replaced("cut", fmt.Sprintf("cut of %s at %d, %s", key, at, kind), map[string][]byte{key: c.bodies[key][:at:at]})
}

func (c *damageCampaign) extend() repoDamage {
	_, key, _ := c.place()
	return replaced("extension", "extension of "+key, map[string][]byte{key: append(bytes.Clone(c.bodies[key]), 0)})
}

func (c *damageCampaign) remove() repoDamage {
	_, key, _ := c.place()
	return replaced("deletion", "deletion of "+key, map[string][]byte{key: nil})
}

// sameKind are the objects of the kind of one.
func (c *damageCampaign) sameKind(key string) (keys []string) {
	for _, other := range c.objects {
		if objectKind(other) == objectKind(key) {
			keys = append(keys, other)
		}
	}
	return keys
}

// exchange exchanges two objects of one kind.
func (c *damageCampaign) exchange() repoDamage {
	for {
		_, key, _ := c.place()
		all := c.sameKind(key)
		other := all[c.rng.IntN(len(all))]
		if other != key {
			return replaced("exchange", "exchange of "+key+" and "+other, map[string][]byte{key: c.bodies[other], other: c.bodies[key]})
		}
	}
}

// exchangePieces exchanges two pieces of one pack, and moves what is between.
func (c *damageCampaign) exchangePieces() repoDamage {
	for {
		kind := []string{"chunk", "map", "tree"}[c.rng.IntN(3)]
		all := c.regions[kind]
		x, y := all[c.rng.IntN(len(all))], all[c.rng.IntN(len(all))]
		if x.key != y.key || x.from >= y.from {
			continue
		}
		b := c.bodies[x.key]
		now := slices.Concat(b[:x.from], b[y.from:y.to], b[x.to:y.from], b[x.from:x.to], b[y.to:])
		d := replaced("pieces", fmt.Sprintf("exchange of the pieces at %d and %d of %s", x.from, y.from, x.key), map[string][]byte{x.key: now})
		d.spans[x.key] = span{x.from, y.to}
		return d
	}
}

// replaceForeign puts an object of another repository into the place of one of its kind. That of the cluster would be believed
// where nothing is sealed: it says the same.
func (c *damageCampaign) replaceForeign() repoDamage {
	_, key, _ := c.place()
	for objectKind(key) == "cluster" && c.r.seals.master == nil {
		_, key, _ = c.place()
	}
	all := c.foreign[objectKind(key)]
	d := replaced("foreign", "object of another repository as "+key, map[string][]byte{key: all[c.rng.IntN(len(all))]})
	d.vague = key == configKey
	return d
}

// replaceTwin puts the same object, sealed with the same key and salt for another repository, into the place of one.
func (c *damageCampaign) replaceTwin() repoDamage {
	key, b := c.choose(c.twins)
	d := replaced("twin", "twin of "+key, map[string][]byte{key: b})
	d.spans[key] = span{objectHeaderSize, math.MaxInt64}
	d.sure = true
	return d
}

// replaceOlder puts the same object, as another attempt encoded it, into the place of one: that is as good.
func (c *damageCampaign) replaceOlder() repoDamage {
	key, b := c.choose(c.older)
	d := replaced("older", "older version of "+key, map[string][]byte{key: b})
	d.fine = true
	return d
}

// spliceOlder puts the beginning of another attempt before the rest of one.
func (c *damageCampaign) spliceOlder() repoDamage {
	key, b := c.choose(c.older)
	at := 17 + c.rng.IntN(len(b)-17)
	return replaced("splice", fmt.Sprintf("older version of %s up to %d", key, at), map[string][]byte{key: append(b[:at:at], c.bodies[key][at:]...)})
}

func (c *damageCampaign) choose(bodies map[string][]byte) (key string, b []byte) {
	keys := slices.Sorted(maps.Keys(bodies))
	key = keys[c.rng.IntN(len(keys))]
	return key, bodies[key]
}
