{% set slack = "8.0" %}
// softmax(scale q k^T) v of every head on matrix units, and the statistics of the softmax of every query: Dao et al., arXiv:2205.14135.
//
// A subgroup has {{ lanes }} queries, one per invocation for all that is not a product. WGSL reaches no single elements of a matrix, so scores pass
// through workgroup memory to the invocation of their query, and probabilities back. Sums stay in matrices. They are scaled, through workgroup
// memory as well, only in steps in which the largest score of a query grew by more than {{ slack }}: until then its probabilities are exp(slack) at
// most, which f16 holds.
// Keys and values of the next step are in registers while those of this step are multiplied.
//
// Rows in workgroup memory are {{ pad }} (f32: 4) elements apart more than they are long, so that eight rows touch all banks once.
{# Inside: rows of queries, keys and values are clamped to the sample's last, columns of a head to its last. q_row, key, t stay below the tile's rows,
   matrices inside the tile: wide is a multiple of size. Statistics have 2·total elements in two rows of their stride. What is finished belongs to a
   row below q_len; columns are those of the head, or, for the last head, the row's padding. #}
{% set keys = "q" if packed else "kv" %}
{% set lowest = "-3.4028234e38" %}
{% set threads = subgroups * lanes %}
{# Columns of a head that matrices cover, rows in workgroup memory. #}
{% set wide = (4 * d + size - 1) // size * size %}
{% set kv_row = wide + pad %}
{% set p_row = tile + pad %}
{% set s_row = tile + 4 %}
{# Sums pass through the place of the scores, as many columns at a time. #}
{% set chunks = (wide + tile - 1) // tile %}
{% set hidden = masked or k_len % tile != 0 %}
{% set several = k_len > tile %}
{# Elements of workgroup memory an index counts: MSL reads matrices from arrays of scalars only. #}
{% set each = 1 if scalar else 4 %}
{% set element = "f16" if scalar else "vec4<f16>" %}
{% set mt = lanes // size %}
{% set nt = tile // size %}
{% set depth = wide // size %}
{% set matrix = "coop_mat" ~ size ~ "x" ~ size %}
var<workgroup> k_tile: array<{{ element }}, {{ tile * kv_row // each }}>;
var<workgroup> v_tile: array<{{ element }}, {{ tile * kv_row // each }}>;
var<workgroup> p_tile: array<{{ element }}, {{ threads * p_row // each }}>;
var<workgroup> s_tile: array<{{ "f32" if scalar else "vec4<f32>" }}, {{ threads * s_row // each }}>;
var<workgroup> inverses: array<f32, {{ threads }}>;
{% if several %}
// Whether sums have to be scaled in this step.
var<workgroup> grew: atomic<u32>;
{% endif %}
{% if hidden %}
var<workgroup> there: array<vec4<u32>, {{ tile // 4 }}>;
{% endif %}
{% macro put(name, at, value) %}
{% if scalar %}
        {
            let place = {{ at }};
            let four = {{ value }};
            {{ name }}[place] = four.x;
            {{ name }}[place + 1u] = four.y;
            {{ name }}[place + 2u] = four.z;
            {{ name }}[place + 3u] = four.w;
        }
{% else %}
        {{ name }}[({{ at }}) / 4u] = {{ value }};
{% endif %}
{% endmacro %}
{% macro four(name, at) %}{% if scalar %}vec4<f32>({{ name }}[{{ at }}], {{ name }}[{{ at }} + 1u], {{ name }}[{{ at }} + 2u], {{ name }}[{{ at }} + 3u]){% else %}{{ name }}[({{ at }}) / 4u]{% endif %}{% endmacro %}

@compute @workgroup_size({{ threads }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
{% include "shared/tile" %}
    let batch = wid.z;
    let head = wid.y;
    let begin0 = wid.x * {{ threads }}u;
    let column = head * {{ d }}u;
    let sub_row = subgroup * {{ lanes }}u;
    let own = sub_row + lane;
    let query = begin0 + own;
{# Which elements of a step's keys and values an invocation loads. #}
{% set loads = (tile * wide // 4 + threads - 1) // threads %}
{% set whole = loads * threads == tile * wide // 4 %}
{% for r in range(loads) %}
    let t{{ r }} = {% if whole %}lid + {{ r * threads }}u{% else %}min(lid + {{ r * threads }}u, {{ tile * wide // 4 - 1 }}u){% endif %};
    let i{{ r }} = t{{ r }} / {{ wide // 4 }}u;
    let c{{ r }} = t{{ r }} % {{ wide // 4 }}u;
    let place{{ r }} = column + {% if wide != 4 * d %}min(c{{ r }}, {{ d - 1 }}u){% else %}c{{ r }}{% endif %};
    var k_next{{ r }}: vec4<f16>;
    var v_next{{ r }}: vec4<f16>;
    var counts{{ r }}: bool;
{% endfor %}
{% if hidden %}
    var there_next: vec4<u32>;
{% endif %}
{% macro load(first) %}
{% for r in range(loads) %}
        {
            let row = batch * {{ k_len }}u + min({{ first }} + i{{ r }}, {{ k_len - 1 }}u);
            k_next{{ r }} = {{ keys }}[row * {{ keys }}_stride + {{ k_first }}u + place{{ r }}];
            v_next{{ r }} = {{ keys }}[row * {{ keys }}_stride + {{ v_first }}u + place{{ r }}];
            counts{{ r }} = {{ first }} + i{{ r }} < {{ k_len }}u{% if masked %} && mask_at(row) != 0.0{% endif %}{% if wide != 4 * d %} && c{{ r }} < {{ d }}u{% endif %};
        }
{% endfor %}
{% if hidden %}
        if (lid < {{ tile // 4 }}u) {
{% for e in range(4) %}
            {
                let key = {{ first }} + 4u * lid + {{ e }}u;
                there_next[{{ e }}] = select(0u, 1u, key < {{ k_len }}u{% if masked %} && mask_at(batch * {{ k_len }}u + min(key, {{ k_len - 1 }}u)) != 0.0{% endif %});
            }
{% endfor %}
        }
{% endif %}
{% endmacro %}
{# Sums of a chunk to the place of the scores, and back. #}
{% macro sums(chunk, function) %}
{% for n in range(chunk * tile // size, [(chunk + 1) * tile, wide]|min // size) %}
{% for i in range(mt) %}
{% set at = "s_tile[(sub_row * " ~ s_row ~ "u + " ~ (i * size * s_row + n * size - chunk * tile) ~ "u) / " ~ each ~ "u], " ~ s_row // each ~ "u" %}
{% if function == "coopStoreT" %}
            coopStoreT(o{{ i }}_{{ n }}, &{{ at }});
{% else %}
            o{{ i }}_{{ n }} = coopLoadT<{{ matrix }}<f32, C>>(&{{ at }});
{% endif %}
{% endfor %}
{% endfor %}
{% endmacro %}
{{ load("0u") }}
{# Queries, in the place of the probabilities, as many columns at a time. Loops are unrolled: loads are under way before the first one is waited
   for. #}
{% for chunk in range(chunks) %}
{% set first = chunk * tile // 4 %}
{% set q_loads = [tile, wide - chunk * tile]|min // 4 %}
    {
{% for r in range(q_loads) %}
        let i{{ r }} = (lid + {{ r * threads }}u) / {{ q_loads }}u;
        let c{{ r }} = (lid + {{ r * threads }}u) % {{ q_loads }}u;
        let q{{ r }} = q[(batch * {{ q_len }}u + min(begin0 + i{{ r }}, {{ q_len - 1 }}u)) * q_stride + column + {% if wide != 4 * d %}min({{ first }}u + c{{ r }}, {{ d - 1 }}u){% else %}{{ first }}u + c{{ r }}{% endif %}];
{% endfor %}
{% if chunk > 0 %}
        workgroupBarrier();
{% endif %}
{% for r in range(q_loads) %}
{{ put("p_tile", "i" ~ r ~ " * " ~ p_row ~ "u + 4u * c" ~ r, "q" ~ r if wide == 4 * d else "select(vec4<f16>(), q" ~ r ~ ", " ~ first ~ "u + c" ~ r ~ " < " ~ d ~ "u)") }}
{% endfor %}
    }
    workgroupBarrier();
{% for u in range(chunk * tile // size, (chunk * tile + 4 * q_loads) // size) %}
{% for i in range(mt) %}
    let q{{ i }}_{{ u }} = coopLoadT<{{ matrix }}<f16, A>>(&p_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size - chunk * tile }}u) / {{ each }}u], {{ p_row // each }}u);
{% endfor %}
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
{% for n in range(depth) %}
    var o{{ i }}_{{ n }} = {{ matrix }}<f32, C>();
{% endfor %}
{% endfor %}
    let at_own = own * {{ s_row }}u;
    var largest = {{ lowest }};
    // What is subtracted from the scores of the query: their largest so far, or less by {{ slack }} at most.
    var top = {{ lowest }};
    var sum = 0.0;
    let end = {% if causal %}min(begin0 + {{ threads }}u, {{ k_len }}u){% else %}{{ k_len }}u{% endif %};
    for (var key0 = 0u; key0 < end; key0 += {{ tile }}u) {
        workgroupBarrier();
{% if several %}
        if (lid == 0u) {
            atomicStore(&grew, 0u);
        }
{% endif %}
{% for r in range(loads) %}
{% if not whole %}
        if (lid + {{ r * threads }}u < {{ tile * wide // 4 }}u) {
{% endif %}
{{ put("k_tile", "i" ~ r ~ " * " ~ kv_row ~ "u + 4u * c" ~ r, "select(vec4<f16>(), k_next" ~ r ~ ", counts" ~ r ~ ")") }}
{{ put("v_tile", "i" ~ r ~ " * " ~ kv_row ~ "u + 4u * c" ~ r, "select(vec4<f16>(), v_next" ~ r ~ ", counts" ~ r ~ ")") }}
{% if not whole %}
        }
{% endif %}
{% endfor %}
{% if hidden %}
        if (lid < {{ tile // 4 }}u) {
            there[lid] = there_next;
        }
{% endif %}
{% if several %}
{{ load("key0 + " ~ tile ~ "u") }}
{% endif %}
        workgroupBarrier();
{# Scores of all keys of the tile. #}
{% for j in range(nt) %}
        {
{% for i in range(mt) %}
            var s{{ i }} = {{ matrix }}<f32, C>();
{% endfor %}
{% for u in range(depth) %}
            let k{{ u }} = coopLoad<{{ matrix }}<f16, B>>(&k_tile[{{ (j * size * kv_row + u * size) // each }}], {{ kv_row // each }}u);
{% for i in range(mt) %}
            s{{ i }} = coopMultiplyAdd(q{{ i }}_{{ u }}, k{{ u }}, s{{ i }});
{% endfor %}
{% endfor %}
{% for i in range(mt) %}
            coopStoreT(s{{ i }}, &s_tile[(sub_row * {{ s_row }}u + {{ i * size * s_row + j * size }}u) / {{ each }}u], {{ s_row // each }}u);
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
{% for c in range(tile // 4) %}
{% if hidden or causal %}
        let seen{{ c }} = {% if hidden %}there[{{ c }}] != vec4<u32>(){% endif %}{% if causal and hidden %} & {% endif %}{% if causal %}(vec4<u32>(0u, 1u, 2u, 3u) + key0 + {{ 4 * c }}u <= vec4<u32>(query)){% endif %};
{% endif %}
        var s{{ c }} = {{ four("s_tile", "at_own + " ~ 4 * c ~ "u") }} * {{ scale }};
{% if hidden or causal %}
        s{{ c }} = select(vec4<f32>({{ lowest }}), s{{ c }}, seen{{ c }});
{% endif %}
        largest = max(largest, max(max(s{{ c }}.x, s{{ c }}.y), max(s{{ c }}.z, s{{ c }}.w)));
{% endfor %}
{% if several %}
        var fade = 1.0;
        if (largest > top + {{ slack }}) {
            fade = exp(top - largest);
            top = largest;
            // The first sums are zero.
            if (key0 > 0u) {
                atomicStore(&grew, 1u);
            }
        }
{% else %}
        top = largest;
{% endif %}
        var part = vec4<f32>();
{% for c in range(tile // 4) %}
        {
{% if hidden or causal %}
            let p = select(vec4<f32>(), exp(s{{ c }} - top), seen{{ c }});
{% else %}
            let p = exp(s{{ c }} - top);
{% endif %}
            part += p;
{{ put("p_tile", "own * " ~ p_row ~ "u + " ~ 4 * c ~ "u", "vec4<f16>(p)") }}
        }
{% endfor %}
{% if not several %}
        sum = (part.x + part.y) + (part.z + part.w);
        workgroupBarrier();
{% else %}
        sum = sum * fade + ((part.x + part.y) + (part.z + part.w));
        // Two barriers: probabilities are there, too.
        if (workgroupUniformLoad(&grew) != 0u) {
{% for chunk in range(chunks) %}
{{ sums(chunk, "coopStoreT") }}
            workgroupBarrier();
{% for c in range([tile, wide - chunk * tile]|min // 4) %}
{{ put("s_tile", "at_own + " ~ 4 * c ~ "u", "(" ~ four("s_tile", "at_own + " ~ 4 * c ~ "u") ~ ") * fade") }}
{% endfor %}
            workgroupBarrier();
{{ sums(chunk, "coopLoadT") }}
{% if chunk + 1 < chunks %}
            workgroupBarrier();
{% endif %}
{% endfor %}
        }
{% endif %}
{% for u in range(nt) %}
{% for i in range(mt) %}
        let p{{ i }}_{{ u }} = coopLoadT<{{ matrix }}<f16, A>>(&p_tile[(sub_row * {{ p_row }}u + {{ i * size * p_row + u * size }}u) / {{ each }}u], {{ p_row // each }}u);
{% endfor %}
{% endfor %}
{% for n in range(depth) %}
        {
{% for u in range(nt) %}
            let v{{ u }} = coopLoadT<{{ matrix }}<f16, B>>(&v_tile[{{ (u * size * kv_row + n * size) // each }}], {{ kv_row // each }}u);
{% for i in range(mt) %}
            o{{ i }}_{{ n }} = coopMultiplyAdd(p{{ i }}_{{ u }}, v{{ u }}, o{{ i }}_{{ n }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
    let inverse = select(1.0 / sum, 0.0, sum == 0.0);
    inverses[own] = inverse;
{# Neighbours store neighbouring columns. #}
{% for chunk in range(chunks) %}
{% set cols = [tile, 4 * d - chunk * tile]|min %}
    workgroupBarrier();
{{ sums(chunk, "coopStoreT") }}
    workgroupBarrier();
{% for r in range(cols // 4) %}
    {
        let i = (lid + {{ r * threads }}u) / {{ cols // 4 }}u;
        let c = (lid + {{ r * threads }}u) % {{ cols // 4 }}u;
        let at = i * {{ s_row }}u + 4u * c;
        if (begin0 + i < {{ q_len }}u) {
            finish(batch * {{ q_len }}u + begin0 + i, column + {{ chunk * tile // 4 }}u + c, {{ four("s_tile", "at") }} * inverses[i]);
        }
    }
{% endfor %}
{% endfor %}
    if (query >= {{ q_len }}u) {
        return;
    }
    let n = (batch * {{ heads }}u + head) * {{ q_len }}u + query;
    stats_put(n, select(largest, 0.0, sum == 0.0));
    stats_put(stats_stride + n, inverse{% if several %} * exp(largest - top){% endif %});
    if (n == {{ total - 1 }}u) {
        for (var i = {{ total }}u; i < stats_stride; i++) {
            stats_put(i, 0.0);
            stats_put(stats_stride + i, 0.0);
        }
    }
{% if heads * d < width %}
    if (head == {{ heads - 1 }}u) {
        for (var i = {{ heads * d }}u; i < {{ width }}u; i++) {
            finish(batch * {{ q_len }}u + query, i, vec4<f32>());
        }
    }
{% endif %}
}
